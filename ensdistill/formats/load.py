"""Teachers from files: ours, the official Flax checkpoints, and PyTorch state_dicts of anybody.

    load_teachers(["runs/digits"], num_classes=10, image_shape=(8, 8, 1))    a run folder: teachers/*/best.safetensors
    load_teachers(["outputs/SGD/*/best_acc1"], …)                            official Flax checkpoints
    load_teachers(["a.pt", "b.pt"], builder="timm:create_model", …)          PyTorch state_dicts

A file's format is read from its first bytes, never from its name. Nothing in a file is executed.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ensdistill.formats.class_order import in_order, match_classes
from ensdistill.formats.flax import Variables, find_variables, read_flax_checkpoint, wide_resnet_from_official
from ensdistill.formats.ours import FORMAT_KEY, SavedNetwork, info_of, is_safetensors, read_safetensors
from ensdistill.formats.pytorch import call_builder, find_state_dict, load_state_dict, read_state_dict
from ensdistill.models import Classifier, build
from ensdistill.models.batch_ensemble import average_members, to_batch_ensemble
from ensdistill.models.ensembles import Teachers
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import parse_json

AnyNetwork = SavedNetwork | Variables | dict[str, Tensor]
"""A network of ours, the official code's arrays, or a state_dict that does not say its network."""

_FORMATS = "our .safetensors, an official Flax checkpoint (msgpack) or a PyTorch state_dict (.pt, .pth, .safetensors)"
# Where a folder keeps its teachers, in the order of looking: ours, the official code's, anybody's.
_IN_FOLDER = (
    ("teachers/*/best.safetensors",),
    ("*/best.safetensors",),
    ("*/best_acc1",),
    ("best.safetensors",),
    ("best_acc1",),
    ("*.safetensors", "*.pt", "*.pth", "*.msgpack"),
)


def load_teachers(
    paths: Sequence[str | Path],
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    builder: str | None = None,
    builder_args: str | Mapping[str, Any] | Sequence[Mapping[str, Any]] = "{}",
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Teachers:
    """Read, build and check the teachers, on the CPU.

    Args:
        paths: files, folders of files, run folders or glob patterns; see `find_files` for their order.
        num_classes: K of the data.
        image_shape: (H, W, C) of the data.
        builder: import path `package.module:function` of what builds the network of a PyTorch state_dict. It may return
            a `Classifier`, which then brings its own normalisation.
        builder_args: the builder's keyword arguments, or their JSON; a list of them gives each PyTorch file its own.
        pixel_mean, pixel_std: (C,), of images in [0, 1]: the normalisation of files that do not bring one.
        class_names: those of the data, in the order of their labels. Teachers whose files name the same classes in
            another order give their logits in this one. None: nothing is compared.
        say: told which classes are moved, and which are taken in order because a file does not name them.
        warn: told which are taken in order though they have other names, for one side's are only numbers.

    Raises:
        UserError: a path gives nothing; a file is not whole, of another form, does not fit its network, or gives other
            classes than the data have, by number or by name, takes other channels, or is not finite on a first batch.
    """
    contents = {file: read_network(file) for file in find_files(paths)}
    theirs = [file for file, content in contents.items() if isinstance(content, dict)]
    arguments = dict(zip(theirs, _spread(parse_builder_args(builder_args), len(theirs)), strict=True))
    normalisation = None if pixel_mean is None or pixel_std is None else (pixel_mean, pixel_std)
    classifiers = []
    notes: dict[tuple[Callable[[str], None], str], list[Path]] = {}
    for file, content in contents.items():
        tell, note = say, "does not name its classes; they are taken in the order of the data's"
        if isinstance(content, SavedNetwork):
            classifier = content.build(file, builder)
            order, note = _match_classes(content.info.class_names, class_names, file)
            tell = warn if order is None else say
            if order is not None:
                classifier.network = in_order(classifier.network, order)
        elif isinstance(content, Variables):
            classifier = _build_official(content, file, image_shape, normalisation)
        else:
            classifier = _build_theirs(content, file, builder, arguments[file], normalisation)
        classifier.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        check_classifier(classifier, str(file), num_classes=num_classes, image_shape=image_shape)
        classifiers.append(classifier)
        notes.setdefault((tell, note), []).append(file)
    if class_names is not None:
        for (tell, note), files in notes.items():
            if note:
                tell(f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: {note}")
    return Teachers(classifiers, num_classes)


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """Find the teachers' files in the order of `paths`; of a folder or a pattern in natural order (2 before 10).

    A folder gives the first of these that it has: `teachers/*/best.safetensors` (a run folder), `*/best.safetensors`,
    `*/best_acc1` (the official code's), `best.safetensors`, `best_acc1`, or every .safetensors, .pt, .pth and .msgpack.

    Raises:
        UserError: a path gives nothing, or one file is given twice.
    """
    files: list[Path] = []
    for given in paths:
        path = Path(given)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = next((some for patterns in _IN_FOLDER if (some := _glob(path, patterns))), [])
            if not found:
                raise UserError(f"{path}: no teachers in this folder; expected a run folder, or files: {_FORMATS}")
        else:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            if not matches:
                raise UserError(f"{path}: no such file or folder; expected {_FORMATS}")
            found = find_files(natural_order(matches))
        files += found
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError(f"{file}: given twice; an ensemble needs different teachers, give each file once")
        seen.add(file.resolve())
    if not files:
        raise UserError("teachers: no path given; expected one or more of " + _FORMATS)
    return files


def _glob(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return natural_order([file for pattern in patterns for file in folder.glob(pattern) if file.is_file()])


def natural_order(paths: Sequence[Path]) -> list[Path]:
    """Sort paths by name, numbers in them by value: 2 before 10."""
    return sorted(
        paths, key=lambda path: [(int(n), "") if n.isdecimal() else (-1, n) for n in re.split(r"([0-9]+)", str(path))]
    )


def parse_builder_args(value: str | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parse the builder's keyword arguments: one dict for all PyTorch files, or one a file. `value` may be their JSON.

    Raises:
        UserError: it is no JSON object and no list of JSON objects.
    """
    parsed: Any = value
    if isinstance(value, str):
        try:
            parsed = parse_json(value)
        except ValueError as error:
            raise UserError(
                f"teacher-args: {value[:200]!r} is no JSON ({error}); "
                """expected such as '{"model_name": "resnet18", "num_classes": 100}'"""
            ) from error
    entries = [parsed] if isinstance(parsed, Mapping) else parsed
    if not isinstance(entries, Sequence) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise UserError(
            f"teacher-args: got {parsed!r:.200}; expected a JSON object, or a list of them, one for each PyTorch file"
        )
    return [dict(entry) for entry in entries]


def _spread(entries: list[dict[str, Any]], num_files: int) -> list[dict[str, Any]]:
    if len(entries) == 1:
        return entries * num_files
    if len(entries) != num_files:
        raise UserError(
            f"teacher-args: a list of {len(entries)} for {num_files} PyTorch files; "
            "expected one object, or one for each file"
        )
    return entries


def read_network(file: Path) -> AnyNetwork:
    """Recognise the format of `file` by its first bytes, and read it.

    Raises:
        UserError: the file is of no known format, or not whole.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); expected {_FORMATS}") from error
    if is_safetensors(head):
        try:
            metadata, tensors = read_safetensors(file)
        except SafetensorError as error:
            raise UserError(f"{file}: no whole safetensors file ({error!s:.200}); copy it again") from error
        if FORMAT_KEY in metadata:
            return SavedNetwork(info_of(metadata, file), tensors)
        return find_state_dict(tensors, file)
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", head):
        return read_state_dict(file)  # a zip archive; before PyTorch 1.6 a pickle
    if re.match(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", head, re.DOTALL):
        # msgpack: a map of 1 … 15, of up to 2^16, of up to 2^32 entries, the first name a short text
        return find_variables(read_flax_checkpoint(file), str(file))
    raise UserError(
        f"{file}: not the file of a network ({size} bytes, the first {head[:4].hex(' ')}); expected {_FORMATS}"
    )


Normalisation = tuple[Sequence[float], Sequence[float]]


def _classifier(network: nn.Module, normalisation: Normalisation | None, file: Path) -> Classifier:
    if normalisation is None:
        raise UserError(f"{file}: does not say its pixel mean and std; give pixel_mean and pixel_std, (C,) each")
    return Classifier(network, *normalisation)


def _match_classes(theirs: Sequence[str], ours: Sequence[str] | None, file: Path) -> tuple[list[int] | None, str]:
    if ours is None or len(theirs) != len(ours):  # the number is checked with the logits
        return None, ""
    return match_classes(theirs, ours, str(file))


def _build_official(
    variables: Variables, file: Path, image_shape: tuple[int, int, int], normalisation: Normalisation | None
) -> Classifier:
    official = wide_resnet_from_official(variables.params, variables.stats, str(file))
    network = build(
        official.name,
        num_classes=official.num_classes,
        in_channels=official.in_channels,
        image_size=image_shape[0],
    )
    E = next((len(tensor) for key, tensor in official.state_dict.items() if key.endswith(".rho_r")), 0)
    if E > 0:  # a student of the official code teaches as what it ships: its average
        student = to_batch_ensemble(network, E)
        student.load_state_dict(student.state_dict() | official.state_dict)  # a layer without factors keeps r = s = 1
        network = average_members(student)
    else:
        network.load_state_dict(official.state_dict)
    if variables.pixel_mean is not None and variables.pixel_std is not None:
        normalisation = (variables.pixel_mean, variables.pixel_std)
    return _classifier(network, normalisation, file)


def _build_theirs(
    state_dict: Mapping[str, Tensor],
    file: Path,
    builder: str | None,
    arguments: Mapping[str, Any],
    normalisation: Normalisation | None,
) -> Classifier:
    if builder is None:
        raise UserError(
            f"{file}: a state_dict does not say its network; expected --teacher-builder package.module:function, "
            "such as timm:create_model, and --teacher-args"
        )
    try:
        module = call_builder(builder, arguments)
    except UserError as error:
        raise UserError(f"{file}: {error} (--teacher-builder, --teacher-args)") from error
    classifier = module if isinstance(module, Classifier) else _classifier(module, normalisation, file)
    load_state_dict(classifier.network, state_dict, f"{file}: the state_dict does not fit {builder}")
    return classifier


def check_both_modes(
    classifier: Classifier, where: str, *, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
    """Run a classifier in training and in evaluation, as `check_classifier` does: some give logits in one alone."""
    for mode in (False, True):
        check_classifier(classifier.train(mode), where, num_classes=num_classes, image_shape=image_shape)


def check_classifier(
    classifier: Classifier, where: str, *, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
    """Run a classifier on two random images, in the mode that it is in, before any long work.

    Args:
        where: its file, for error messages.
        num_classes, image_shape: K and (H, W, C) of the data.

    Raises:
        UserError: it does not take such images, gives other classes, values that are not finite, or probabilities in
            place of logits.
    """
    H, W, C = image_shape
    if (found := classifier.pixel_mean.numel()) not in (1, C) or classifier.pixel_std.numel() not in (1, C):
        raise UserError(f"{where}: takes images of {found} channels, the data have {C}; choose one for such images")
    x_BCHW = torch.rand(2, C, H, W, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    shares: list[Tensor] = []  # what sigmoids gave
    sigmoids = [module for module in classifier.modules() if isinstance(module, nn.Sigmoid)]
    hooks = [module.register_forward_hook(lambda _, given, out: shares.append(out)) for module in sigmoids]
    try:
        with torch.no_grad():  # no inference mode: what a module caches must serve a backward later
            logits = classifier(x_BCHW)
    except Exception as error:  # foreign code: the message is what there is to know
        convs = [layer for layer in classifier.modules() if isinstance(layer, nn.Conv2d)]
        takes = f"its first conv takes {convs[0].in_channels} channels" if convs else type(error).__name__
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{where}: does not take images of {H} x {W} pixels and {C} channels, as the data have "
            f"({takes}: {reason}); choose one for such images"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        found_type = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{where}: gives {found_type} for 2 images; expected logits of shape (2, {num_classes})")
    if logits.shape[1] != num_classes:
        raise UserError(
            f"{where}: gives {logits.shape[1]} classes, the data have {num_classes}; give teachers of the same classes"
        )
    if not bool(logits.isfinite().all()):
        raise UserError(
            f"{where}: gives values that are not finite; it was saved after its training failed, give another"
        )
    # Probabilities would be softened a second time: training runs, and learns next to nothing. Their logarithms do.
    sums_B = logits.double().sum(dim=1)
    rounding = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 1e-2
    are_shares = bool((logits >= 0).all()) and bool(((sums_B - 1).abs() <= rounding).all())
    if are_shares or any(out is logits for out in shares):
        values, last = ("rows that sum to 1", "softmax") if are_shares else ("numbers between 0 and 1", "sigmoid")
        raise UserError(
            f"{where}: gives probabilities ({values}); expected logits: leave out the {last} that it ends with, or "
            "give its logarithms"
        )
