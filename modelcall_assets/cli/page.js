'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
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
  : typeof value === 'string' ? value : JSON.stringify(value, null, 1);

// A value of a record by its path, as in `raw_data.language`.
function valueOf(record, path) {
  const values = record.values;
  if (path in values) return values[path];
  return path.split('.').reduce((at, step) => at === null || at === undefined ? at : at[step], values);
}

// `score >= 4 and language = python`, with the meaning that it has for `modelcall export --where`.
function condition(text) {
  const comparison = /^\s*("[^"]+"|[^\s=!<>"']+)\s*(==|!=|<=|>=|=|<|>)\s*("[^"]*"|'[^']*'|[^\s"'=!<>]+)\s*/;
  const words = { true: true, false: false, null: null }, tests = [];
  for (let rest = text; ;) {
    const found = comparison.exec(rest);
    if (!found) return null;
    const [all, column, sign, written] = found;
    const quoted = /^["']/.test(written), said = quoted ? written.slice(1, -1) : written;
    const wanted = quoted ? said : said in words ? words[said]
      : said.trim() !== '' && !Number.isNaN(Number(said)) ? Number(said) : said;
    tests.push([column.replace(/"/g, ''), sign, said, wanted]);
    rest = rest.slice(all.length);
    if (rest === '') break;
    if (!/^and\b/i.test(rest)) return null;
    rest = rest.slice(3);
  }
  return (record) => tests.every(([column, sign, said, wanted]) => {
    let have = valueOf(record, column);
    if (have === undefined) have = null;
    const equal = sign === '=' || sign === '==', unequal = sign === '!=';
    if (have === null) return wanted === null && equal;
    if (wanted === null) return unequal;
    if (typeof have === 'string') {
      if (!equal && !unequal && typeof wanted !== 'string') return false;
      wanted = said;
    } else if (typeof have !== typeof wanted) return unequal;
    return equal ? have === wanted : unequal ? have !== wanted : sign === '<' ? have < wanted
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

const CELLS = { file: (record) => record.file, row: (record) => record.row, id: (record) => record.id,
  status: (record) => record.reason || (record.status ?? '') };
const cell = (record, column) => column in CELLS ? CELLS[column](record) : valueOf(record, column);

function compare(one, other) {
  const empty = (value) => value === null || value === undefined || value === '';
  if (empty(one) || empty(other)) return empty(one) - empty(other);
  const both = typeof one === 'number' && typeof other === 'number';
  const order = both ? one - other : shown(one) < shown(other) ? -1 : shown(one) > shown(other) ? 1 : 0;
  return state.descending ? -order : order;
}

function chosen() {
  const word = byId('word').value.toLowerCase(), written = byId('where').value.trim();
  const holds = written ? condition(written) : () => true;
  byId('where').setAttribute('aria-invalid', holds === null);
  byId('wrong').textContent = holds === null ? 'not a condition: expected column op value, as in score < 2' : '';
  const file = byId('file').value, reason = byId('reason').value;
  const found = data.records.filter((record) => (!word || allText(record).includes(word))
    && (holds === null || holds(record)) && (!file || record.file === file)
    && (!reason || (reason === ' success' ? !record.reason : record.reason === reason)));
  if (state.column !== null) {
    found.sort((one, other) => compare(cell(one, state.column), cell(other, state.column)));
  }
  return found;
}

const quoted = (text) => /^[\w./:=@%+,-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

// What asks just these rows again.
function command(found) {
  if (!data.retry || !found.length) return '';
  const reason = byId('reason').value.trim(), file = byId('file').value, where = byId('where').value.trim();
  const parts = [data.retry];
  if (file) parts.push('--file', quoted(file.replace(/[*?[]/g, '[$&]')));
  if (reason && reason !== 'success') parts.push('--reason', reason);
  if (where && !byId('wrong').textContent) parts.push('--where', quoted(where));
  if (byId('word').value || reason === 'success' || !(reason || where || file)) {
    const ids = found.map((record) => record.id);
    if (ids.length > MOST_IDS || ids.some((id) => id.includes(','))) return '';
    parts.push('--ids', quoted(ids.join(',')));
  }
  return parts.join(' ');
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
    const cells = data.columns.map((column) => {
      const value = cell(record, column), text = shown(value);
      const kind = typeof value === 'number' ? 'number'
        : column === 'status' ? (record.reason ? 'error' : 'success') : '';
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
  const again = command(found);
  byId('retry').textContent = again;
  byId('again').hidden = !again;
}

byId('heads').replaceChildren(...data.columns.map((column) => {
  const isNumber = data.records.some((record) => typeof cell(record, column) === 'number');
  const button = make('button', { type: 'button' }, column);
  const head = make('th', { class: isNumber ? 'number' : '' }, button);
  button.onclick = () => {
    state.descending = state.column === column && !state.descending;
    state.column = column;
    for (const each of byId('heads').children) each.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', state.descending ? 'descending' : 'ascending');
    for (const each of byId('heads').querySelectorAll('button')) each.textContent = each.textContent.replace(/ [▲▼]$/, '');
    button.textContent = `${column} ${state.descending ? '▼' : '▲'}`;
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
