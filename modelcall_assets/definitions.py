"""What Dagster loads: every task of the project. `workspace.yaml` points here."""

from pathlib import Path

from modelcall_assets.config.catalog import find_root, load_catalog
from modelcall_assets.defs.project import project_definitions

defs = project_definitions(load_catalog(find_root(Path.cwd())))
