"""What Dagster loads: every task of the project. `workspace.yaml` points here."""

from pathlib import Path

from modelcall_assets.config.catalog import find_root, is_root, load_catalog
from modelcall_assets.defs import project_definitions
from modelcall_assets.defs.instance import mend_own_home
from modelcall_assets.errors import Problem, SetupError

mend_own_home()
_root = find_root(Path.cwd())
if not is_root(_root):
    fix = "start Dagster in the project's folder"
    needs = "workspace.yaml or configs/, here or above"
    raise SetupError([Problem(str(_root), "", "no project", needs, fix=fix)])
defs = project_definitions(load_catalog(_root))
