'use strict';
// Integers that a double cannot hold are BigInts.
const integer = (value, text) => /^[+-]?\d+$/.test(text) && !Number.isSafeInteger(value) ? BigInt(text) : value;
const data = JSON.parse(document.getElementById('data').textContent, (_, value, context) =>
  typeof value === 'number' && Math.abs(value) > 2 ** 53 && context ? integer(value, context.source) : value);
BigInt.prototype.toJSON = function () { return Number(this); };
const isNumber = (value) => typeof value === 'number' || typeof value === 'bigint';
const PAGE = 100, MOST_IDS = 100;
const byId = (id) => document.getElementById(id);
const state = { column: null, descending: false, page: 0 };

function make(tag, attributes, ...inner) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...inner);
  return element;
}

const shown = (value) => value === null || value === undefined ? ''
  : typeof value === 'string' || isNumber(value) ? String(value) : JSON.stringify(value, null, 1);

// A value of a record by its path, as in `raw_data.language`; null where there is none.
function valueOf(record, path) {
  const own = (at, name) => Object.hasOwn(at, name) ? at[name] : null;
  if (Object.hasOwn(record.values, path)) return record.values[path];
  return path.split('.').reduce((at, step) => Array.isArray(at) ? (/^\d{1,9}$/.test(step) ? at[Number(step)] ?? null : null)
    : at !== null && typeof at === 'object' ? own(at, step) : null, record.values);
}

// What a word of a condition means: a number, a truth value, null, or itself.
function meaning(word) {
  const words = { true: true, false: false, null: null, nan: NaN }, lower = word.toLowerCase();
  if (Object.hasOwn(words, lower)) return words[lower];
  if (/^[+-]?inf(inity)?$/.test(lower)) return lower[0] === '-' ? -Infinity : Infinity;
  const digits = word.replace(/(?<=\d)_(?=\d)/g, '');
  return /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(digits) ? integer(Number(digits), digits) : word;
}

// `score >= 4 and language = python`, with the meaning that it has for `modelcall export --where`; a text
// that says why it is none.
function condition(text) {
  const comparison = /^\s*("[^"]+"|[^\s=!<>"']+)\s*(==|!=|<=|>=|=|<|>)\s*("[^"]*"|'[^']*'|[^\s"'=!<>]+)\s*/;
  const none = 'not a condition: expected column op value, as in score < 2', tests = [];
  for (let rest = text; ;) {
    const found = comparison.exec(rest);
    if (!found) return none;
    const [all, named, sign, written] = found, column = named.replace(/"/g, '');
    const quoted = /^["']/.test(written), said = quoted ? written.slice(1, -1) : written;
    const wanted = quoted ? said : meaning(said);
    if (wanted === null && /[<>]/.test(sign)) return 'null can only be compared with = and !=';
    if (data.messages.includes(column.split('.')[0])) return `${column} holds messages: see modelcall report --where`;
    if (!data.records.some((record) => Object.hasOwn(record.values, column)
      || Object.hasOwn(record.values, column.split('.')[0]))) return `no record here has ${column}`;
    tests.push([column, sign, said, wanted]);
    rest = rest.slice(all.length);
    if (rest === '') break;
    if (!/^and\b/i.test(rest)) return none;
    rest = rest.slice(3);
  }
  return (record) => tests.every(([column, sign, said, wanted]) => {
    const have = valueOf(record, column), equal = sign === '=' || sign === '==', unequal = sign === '!=';
    if (have === null) return wanted === null && equal;
    if (wanted === null) return unequal;
    if (typeof have === 'string') {
      if (!equal && !unequal && typeof wanted !== 'string') return false;
      wanted = said;
    } else if (isNumber(have) ? !isNumber(wanted) : typeof have !== typeof wanted) return unequal;
    return equal ? have == wanted : unequal ? have != wanted : sign === '<' ? have < wanted
      : sign === '<=' ? have <= wanted : sign === '>' ? have > wanted : have >= wanted;
  });
}

const texts = new Map();
function allText(record) {
  if (!texts.has(record)) {
    const turns = [...record.turns, ...record.prompt].flatMap((turn) => turn.parts);
    const said = turns.map((part) => data.texts[part.text]).join('\n');
    texts.set(record, `${record.file}\n${record.id}\n${JSON.stringify(record.values)}\n${said}`.toLowerCase());
  }
  return texts.get(record);
}

const COLUMNS = [['file', (record) => record.file], ['row', (record) => record.row], ['id', (record) => record.id],
  ['status', (record) => record.reason || record.status], ...data.columns.map((name) => [name, (record) => valueOf(record, name)])]
  .filter(([name], at) => at !== 3 || data.records.some((record) => record.status || record.reason));

function compare(one, other) {
  const empty = (value) => value === null || value === undefined || value === '';
  if (empty(one) || empty(other)) return empty(one) - empty(other);
  const both = isNumber(one) && isNumber(other);
  const order = both ? Number(one) - Number(other) : shown(one) < shown(other) ? -1 : shown(one) > shown(other) ? 1 : 0;
  return state.descending ? -order : order;
}

function chosen() {
  const word = byId('word').value.toLowerCase(), written = byId('where').value.trim();
  const holds = written ? condition(written) : () => true, wrong = typeof holds === 'string';
  byId('where').setAttribute('aria-invalid', wrong);
  byId('wrong').textContent = wrong ? holds : '';
  const file = byId('file').value, reason = byId('reason').value;
  const found = data.records.filter((record) => (!word || allText(record).includes(word))
    && (wrong || holds(record)) && (!file || record.file === file)
    && (!reason || (reason === ' success' ? !record.reason : record.reason === reason)));
  if (state.column !== null) {
    const [, cell] = COLUMNS[state.column];
    found.sort((one, other) => compare(cell(one), cell(other)));
  }
  return found;
}

const quoted = (text) => /^[\w./:=@%+,-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

// What asks just these rows again, and what to know of it.
function command(found) {
  if (!data.retry || !found.length || byId('wrong').textContent) return ['', ''];
  const reason = byId('reason').value.trim(), files = new Set(found.map((record) => record.file));
  const conditions = [data.retry.where, byId('where').value.trim()].filter(Boolean);
  const byIds = byId('word').value || reason === 'success' || !(reason || conditions.length);
  const file = byId('file').value || (byIds && files.size === 1 && found[0].file);
  const parts = [data.retry.command], ids = new Set(found.map((record) => record.id));
  if (file) parts.push('--file', quoted(`/${file.replace(/[*?[]/g, '[$&]')}`));
  else if (data.retry.file) parts.push('--file', quoted(data.retry.file));
  const isSample = data.seen > data.records.length;
  if (reason && reason !== 'success') parts.push('--reason', reason);
  if (conditions.length) parts.push('--where', quoted(conditions.join(' and ')));
  if (!byIds) return [parts.join(' '), isSample ? 'and all others like them, which this sample leaves out: ' : ''];
  if (ids.size > MOST_IDS) return ['', `choose at most ${MOST_IDS} records, or an outcome or a condition`];
  const others = data.records.filter((record) => ids.has(record.id) && (!file || record.file === file));
  const isUnique = data.retry.unique === 'all' || (data.retry.unique === 'file' && file);
  if (others.length > found.length || (isSample && !isUnique)) {
    return ['', 'other records have the same ids: choose a file, an outcome or a condition'];
  }
  if ([...ids].some((id) => id.trim() !== id || /,|^-?$/.test(id))) {
    return ['', 'such ids are given to modelcall retry --ids -, one a line'];
  }
  parts.push('--ids', quoted([...ids].join(',')));
  return [parts.join(' '), ''];
}

function folded(title, inner, open) {
  const element = make('details', {}, make('summary', {}, title), ...inner);
  element.open = open;
  return element;
}

function turnOf(turn) {
  const parts = turn.parts.map((part) => {
    const text = data.texts[part.text];
    if (part.kind === 'text') return make('div', { class: 'text' }, text);
    if (part.kind === 'reasoning') return folded('reasoning', [make('div', { class: 'text' }, text)], false);
    const title = part.kind === 'call' ? `calls ${part.title}` : part.title;
    return make('div', {}, make('small', {}, title), make('pre', {}, text));
  });
  const kind = turn.role === 'assistant' ? 'assistant' : 'other';
  return make('section', { class: kind }, make('h3', {}, turn.role), ...parts);
}

function opened(record) {
  const inner = [];
  if (record.prompt.length) inner.push(folded('prompt, as it was sent', record.prompt.map(turnOf), false));
  inner.push(...record.turns.map(turnOf));
  const rows = Object.entries(record.values).filter(([, value]) => value !== null).map(([name, value]) =>
    make('tr', {}, make('th', {}, name), make('td', { class: 'text' }, shown(value))));
  inner.push(folded('columns', [make('table', {}, ...rows)], !record.turns.length));
  return inner;
}

function toggle(row, record) {
  if (row.nextSibling && row.nextSibling.className === 'opened') {
    row.nextSibling.remove();
  } else {
    row.after(make('tr', { class: 'opened' }, make('td', { colspan: row.cells.length }, ...opened(record))));
  }
  row.setAttribute('aria-expanded', row.nextSibling?.className === 'opened');
}

function show() {
  const found = chosen(), pages = Math.max(1, Math.ceil(found.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  const rows = found.slice(state.page * PAGE, (state.page + 1) * PAGE).map((record) => {
    const cells = COLUMNS.map(([, cell], at) => {
      const value = cell(record), text = shown(value);
      const kind = at > 3 || at === 1 ? (isNumber(value) ? 'number' : '')
        : at === 3 ? (record.reason && !record.is_good ? 'error' : 'success') : '';
      return make('td', { class: kind }, text.length > 120 ? `${text.slice(0, 120)}…` : text);
    });
    const row = make('tr', { tabindex: 0, 'aria-expanded': false }, ...cells);
    row.onclick = () => toggle(row, record);
    row.onkeydown = (event) => { if (event.key === 'Enter') toggle(row, record); };
    return row;
  });
  byId('rows').replaceChildren(...rows);
  byId('count').textContent = `${found.length.toLocaleString('en')} of ${data.records.length.toLocaleString('en')}`;
  byId('pages').textContent = pages > 1 ? `page ${state.page + 1} of ${pages}` : '';
  byId('before').hidden = byId('after').hidden = pages < 2;
  const [again, note] = command(found);
  byId('note').textContent = note;
  byId('retry').textContent = again;
  byId('again').hidden = !again && !note;
}

byId('heads').replaceChildren(...COLUMNS.map(([name, cell], column) => {
  const hasNumbers = data.records.some((record) => isNumber(cell(record)));
  const button = make('button', { type: 'button' }, name);
  const head = make('th', { class: hasNumbers ? 'number' : '' }, button);
  button.onclick = () => {
    state.descending = state.column === column && !state.descending;
    state.column = column;
    for (const each of byId('heads').children) each.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', state.descending ? 'descending' : 'ascending');
    for (const each of byId('heads').querySelectorAll('button')) each.textContent = each.textContent.replace(/ [▲▼]$/, '');
    button.textContent = `${name} ${state.descending ? '▼' : '▲'}`;
    show();
  };
  return head;
}));
for (const [name, all, of] of [['file', 'all files', (record) => record.file],
  ['reason', 'all rows', (record) => record.reason]]) {
  const values = [...new Set(data.records.map(of))].filter(Boolean).sort();
  const options = values.map((value) => make('option', { value }, value));
  if (name === 'reason' && values.length) options.unshift(make('option', { value: ' success' }, 'success'));
  byId(name).replaceChildren(make('option', { value: '' }, all), ...options);
  byId(name).hidden = !options.length || (name === 'file' && options.length < 2);
}
for (const name of ['word', 'where', 'file', 'reason']) byId(name).oninput = () => { state.page = 0; show(); };
byId('before').onclick = () => { state.page = Math.max(0, state.page - 1); show(); };
byId('after').onclick = () => { state.page += 1; show(); };
show();
