"""What a training's modules were computed by, in its passes.json: so that a resumed one keeps to it, and those like it.

Compiled passes round differently, and `--compile auto` chooses by the clock. The choice is made once, before the first
step of the first training of a kind; the others of the kind, and whoever goes on, follow it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from ensdistill.engine.modules.passes import compiled
from ensdistill.engine.modules.rehearsal import Compiling, Trial
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write

FILE = "passes.json"


def write_passes(folder: Path, trial: Trial) -> None:
    """Write what `trial` chose for the training in `folder`, and by what."""
    values = {"captured": trial.captured, "compiled": trial.compiled, **trial.facts}
    with atomic_write(folder / FILE) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def compiling(asked: Compiling | None, folder: Path, alike: Iterable[Path], device: torch.device) -> Compiling:
    """Decide whether the training in `folder` is compiled, or whether that is to be measured.

    Args:
        asked: the command's option.
        alike: folders of trainings of its kind, whose choice it follows where `auto` is asked for.

    Raises:
        UserError: it was begun otherwise than is asked for, or a record cannot be read.
    """
    recorded = _recorded(folder)
    if (folder / "checkpoint.pt").exists():
        begun: Compiling = "yes" if recorded else "no"
        if asked in ("yes", "no") and asked != begun:
            raise UserError(
                f"{folder}: was begun {'' if recorded else 'un'}compiled, got --compile {asked}; go on with "
                f"--compile {begun}, which keeps its numbers, or choose another --out"
            )
        return begun
    wanted: Compiling = asked or ("auto" if device.type == "cuda" else "no")
    if wanted != "auto":
        return wanted
    choices = [choice for choice in map(_recorded, (folder, *alike)) if choice is not None]
    return wanted if not choices else "yes" if choices[0] else "no"


def _recorded(folder: Path) -> bool | None:
    path = folder / FILE
    try:
        choice = json.loads(path.read_text(encoding="utf-8"))["compiled"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: not a record of how passes are computed ({error}); delete {folder}") from error
    if not isinstance(choice, bool):
        raise UserError(f"{path}: compiled is {choice!r}, expected true or false; delete {folder}")
    return choice


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile works here at all.

    Raises:
        UserError: it does not.
    """
    try:
        compiled(lambda x: x.sin() + 1)(torch.ones(4, device=device))
    except Exception as error:  # a compiler's own errors have no common kind
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UserError(
            f"compile: yes, but torch.compile does not work here ({type(error).__name__}: {text[:200]}); "
            "install a C++ compiler (g++), or give --compile no"
        ) from error
