"""The form of the tables: rows that say what DeepSpeed does with a changed setting.

A question is a tuple of rows, and the first row whose condition holds answers it. A row says what the
setting was and is, what that does to a resumed run and, where DeepSpeed raises an error, at which moment of
the launch, of which class, with which text, and in which function. Texts are templates: `c` is the Case,
`x` what the condition gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from msgspec import Struct

from ckpttools.frameworks.rules import IMPOSSIBLE, About, Class
from ckpttools.resume.deepspeed.case import Case
from ckpttools.resume.forecast import Difference, Moment, Refusal


class Row(Struct, frozen=True, kw_only=True):
    about: About
    setting: str
    when: Callable[[Case], object]  # holds where it gives something true: `x` in the templates
    values: Callable[[Case], tuple[object, object]] = lambda c: (None, None)  # as it was, as it is to be
    cls: Class = IMPOSSIBLE
    why: str
    hint: str = ""
    moment: Moment | None = None  # of the error; None: nothing is raised
    error: str = ""
    text: str = ""
    source: str = ""  # the function that raises it


Question = tuple[Row, ...]


def ask(case: Case, questions: Iterable[Question]) -> Iterator[Difference]:
    """The first row of each question that holds."""
    for question in questions:
        for row in question:
            x = row.when(case)
            if x:
                if row.setting:
                    yield _difference(row, case, x)
                break


def _difference(row: Row, case: Case, x: object) -> Difference:
    def filled(template: str) -> str:
        return template.format(c=case, x=x)

    old, new = row.values(case)
    refusal = None
    if row.moment is not None:
        refusal = Refusal(moment=row.moment, error=row.error, text=filled(row.text))
    return Difference(
        about=row.about,
        setting=filled(row.setting),
        old=old,
        new=new,
        cls=row.cls,
        why=filled(row.why),
        hint=filled(row.hint),
        refusal=refusal,
    )
