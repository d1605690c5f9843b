"""MMLU: questions of 57 subjects with four choices."""

from __future__ import annotations

from typing import ClassVar

from modelcall_assets.records.outcome import Row
from modelcall_assets.sources.base import Conversation, HubSource, dialogue, render_mc

LETTERS = ("A", "B", "C", "D")
SUBJECTS = (
    *("abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge"),
    *("college_biology", "college_chemistry", "college_computer_science", "college_mathematics"),
    *("college_medicine", "college_physics", "computer_security", "conceptual_physics"),
    *("econometrics", "electrical_engineering", "elementary_mathematics", "formal_logic"),
    *("global_facts", "high_school_biology", "high_school_chemistry"),
    *("high_school_computer_science", "high_school_european_history", "high_school_geography"),
    *("high_school_government_and_politics", "high_school_macroeconomics"),
    *("high_school_mathematics", "high_school_microeconomics", "high_school_physics"),
    *("high_school_psychology", "high_school_statistics", "high_school_us_history"),
    *("high_school_world_history", "human_aging", "human_sexuality", "international_law"),
    *("jurisprudence", "logical_fallacies", "machine_learning", "management", "marketing"),
    *("medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition"),
    *("philosophy", "prehistory", "professional_accounting", "professional_law"),
    *("professional_medicine", "professional_psychology", "public_relations", "security_studies"),
    *("sociology", "us_foreign_policy", "virology", "world_religions"),
)
_SPLITS = ("validation", "dev", "test")


class MMLU(HubSource):
    """`all`, or one subject. Older copies have a subset `auxiliary_train`, each row of which is
    inside a column `train`."""

    hub = "cais/mmlu"
    subsets: ClassVar = {
        "all": ("auxiliary_train", *_SPLITS),
        "auxiliary_train": ("train",),
        **dict.fromkeys(SUBJECTS, _SPLITS),
    }
    columns: ClassVar = {"question": str, "choices": list, "answer": int, "subject": str}
    grader, baseline, eval_type = "choice", 0.25, "categorical"

    def row(self, row: Row) -> Row:
        nested = row.get("train")
        return nested if isinstance(nested, dict) else row

    def conversation(self, row: Row) -> Conversation:
        choices, answer = row["choices"], row["answer"]
        if len(choices) != len(LETTERS):
            raise ValueError(f"choices: expected {len(LETTERS)}; have {len(choices)}")
        if answer not in range(len(LETTERS)):
            raise ValueError(f"answer: expected 0 to {len(LETTERS) - 1}; have {answer}")
        question = render_mc(row["question"], LETTERS, choices)
        return dialogue(question, LETTERS[answer], letters=[*LETTERS], subject=row["subject"])
