"""Methods: a student and the data that it is shown, `latentbe+tdiv-sdiv`."""

from __future__ import annotations

from dataclasses import dataclass

from ensdistill.runtime.errors import UserError, nearest

STUDENTS = {
    "ce": "one plain network on labels; how each teacher is trained too",
    "kd": "one plain network; the softened cross-entropy averaged over the teachers",
    "latentbe": "BatchEnsemble, one teacher a member, averaged into one plain network at the end",
    "be": "the same, kept as an ensemble: E forwards at inference, mean of probabilities",
    "hydra": "shared trunk; last group, final norm and classifier once per member",
}
SHOWN = {
    "clean": "the augmented image itself",
    "gaussian": "normal noise of standard deviation 1/255",
    "ods": "a step along a random direction of one teacher's softened outputs",
    "confods": "the same, scaled by that teacher's confidence",
    "tdiv": "a step towards disagreement of two teachers",
    "tdiv-sdiv": "the same, minus the disagreement of the two student members that they teach",
}
_SHOWN_FOR = {student: tuple(SHOWN) for student in ("latentbe", "be", "hydra")} | {
    "ce": ("clean", "gaussian"),
    "kd": ("clean", "gaussian", "ods", "confods", "tdiv"),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A student and the data that it is shown, in a combination that exists."""

    student: str
    """Kind of student, one of `STUDENTS`."""
    shown: str = "clean"
    """Data that the student is shown, one of `SHOWN`."""

    def __post_init__(self) -> None:
        if self.student not in STUDENTS:
            hint = nearest(self.student, STUDENTS)
            raise UserError(
                f"method: no student is called '{self.student}'{hint}; expected one of {', '.join(STUDENTS)}"
            )
        if self.shown not in SHOWN:
            hint = nearest(self.shown, SHOWN)
            raise UserError(f"method: no data is called '{self.shown}'{hint}; expected one of {', '.join(SHOWN)}")
        if self.shown not in _SHOWN_FOR[self.student]:
            raise UserError(
                f"method: '{self.student}' cannot be shown '{self.shown}'; "
                f"it goes with {', '.join(_SHOWN_FOR[self.student])}"
            )

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read `latentbe+tdiv-sdiv` or `latentbe` (shown clean data).

        Raises:
            UserError: a part is unknown (with the nearest name) or the two do not go together.
        """
        student, plus, shown = text.partition("+")
        if plus and not shown:
            raise UserError(
                f"method: '{text}' names no data after its +; give '{student}', or one of {', '.join(SHOWN)}"
            )
        return cls(student=student, shown=shown or "clean")

    def __str__(self) -> str:
        return self.student if self.shown == "clean" else f"{self.student}+{self.shown}"

    @property
    def has_members(self) -> bool:
        """True where the student has E members, one teacher each."""
        return self.student in ("latentbe", "be", "hydra")

    @property
    def needs_teachers(self) -> bool:
        """True where teachers take part in the step."""
        return self.student != "ce"
