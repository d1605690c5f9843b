"""What Dagster loads: every task of the project. `workspace.yaml` points here."""

from pathlib import Path

from modelcall_assets.defs import definitions_of
from modelcall_assets.defs.instance import mend_own_home

mend_own_home()
defs = definitions_of(Path.cwd())
