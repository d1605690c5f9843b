"""A data set on the Hugging Face Hub as it is written: by one commit, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from modelcall_assets.errors import Problem, SetupError, StoreError
from modelcall_assets.records.secrets import Remover
from modelcall_assets.sources.data import package

HUB = "hf://datasets/"
TOKEN = "HF_TOKEN"
_CHECK = {
    401: f"{TOKEN}: the Hub does not know it",
    403: f"{TOKEN}: it may not write there",
    404: "the name, the branch, and what the token may see",
    409: "whether somebody else writes there, and run it again",
    412: "who has committed to it meanwhile, and run it again",
}
"""By the status of the answer."""


@dataclass(frozen=True)
class HubDataset:
    """`<org>/<name>`, and a branch of it. StoreError when the Hub refuses or does not answer;
    SetupError when its package, or the token in `env`, is missing."""

    name: str
    env: Mapping[str, str]
    branch: str | None = None
    private: bool = False

    def __str__(self) -> str:
        return f"{HUB}{self.name}{f'@{self.branch}' if self.branch else ''}"

    def open(self) -> tuple[str, Sequence[str]]:
        """Its last commit and the files in it; created first where it is not there."""
        if not self._asked("repo_exists"):
            self._asked("create_repo", private=self.private or None, exist_ok=True)
        if self.branch:
            self._asked("create_branch", branch=self.branch, exist_ok=True)
        info = self._asked("repo_info", revision=self.branch)
        return info.sha, [file.rfilename for file in info.siblings or ()]

    def commit(self, folder: Path, old: Sequence[str], parent: str) -> str:
        """Put all files of the folder in the place of the `old` ones; gives the commit's address.
        Refused when `parent` is no longer the last commit: then, and after an error, what was there
        stands."""
        of_it = {"folder_path": folder, "delete_patterns": [*old], "revision": self.branch}
        told = {"commit_message": "modelcall publish", "parent_commit": parent}
        return self._asked("upload_folder", **of_it, **told).commit_url

    @cached_property
    def _api(self) -> Any:
        if not (token := self.env.get(TOKEN)):
            fix = "set it in the environment or in .env: a token that may write"
            raise SetupError([Problem(str(self), "", f"{TOKEN} is not set", fix=fix)])
        hub = package("huggingface_hub", str(self), "hub")
        if not sys.stderr.isatty():
            package("huggingface_hub.utils").disable_progress_bars()
        return hub.HfApi(endpoint=self.env.get("HF_ENDPOINT"), token=token)

    def _asked(self, method: str, **options: Any) -> Any:
        ask = getattr(self._api, method)
        try:
            return ask(repo_id=self.name, repo_type="dataset", **options)
        except Exception as error:  # those of several libraries, other ones in each version
            cause = _answered(error)
            said = Remover([self.env[TOKEN]]).text(" ".join(str(cause).split()))
            status = getattr(getattr(cause, "response", None), "status_code", 0)
            check = _CHECK.get(status, "the network, and whether the Hub is well")
            raise StoreError(f"{self}: not published: {said}; check {check}") from error


def _answered(error: BaseException) -> BaseException:
    """What has led to an error: the Hub's answer, else the first of all."""
    while not hasattr(error, "response") and error.__cause__ is not None:
        error = error.__cause__
    return error
