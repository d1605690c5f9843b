"""What Dagster loads: every task of the project. `workspace.yaml` points here."""

from pathlib import Path

from modelcall_assets.config.catalog import find_root, load_catalog
from modelcall_assets.defs import project_definitions
from modelcall_assets.defs.instance import mend_own_home

mend_own_home()
defs = project_definitions(load_catalog(find_root(Path.cwd())))
