"""Networks of others: their PyTorch state_dicts, and the functions that build the modules to load them into."""

from __future__ import annotations

import importlib
import io
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ensdistill.runtime.errors import UserError, first_names
from ensdistill.runtime.files import damaged_part

_NESTED = ("state_dict", "model_state_dict", "model")


def read_state_dict(file: str | Path) -> dict[str, Tensor]:
    """Read the tensors that `torch.save` wrote. Nothing in the file is executed.

    Raises:
        UserError: the file is truncated or damaged, holds Python objects, or no tensors by name.
    """
    try:
        # before PyTorch 1.6 it was a pickle, without checksums
        if zipfile.is_zipfile(file) and (part := damaged_part(file)) is not None:
            raise ValueError(f"the bytes of {part} are not those that were written: copy it again")
        with _Bounded(open(file, "rb", buffering=0)) as stream:
            loaded: Any = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler lets through whatever a corrupt file makes it raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if reason.startswith("Weights only load failed"):  # an advice to load it all the same follows, in colours
            found = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds {found[1] if found else 'Python objects'}, whose loading may run code"
        raise UserError(
            f"{file}: no state_dict can be read ({reason[:200]}); "
            "expected a whole file of torch.save(module.state_dict(), path), which holds tensors alone"
        ) from error
    return find_state_dict(loaded, file)


class _Bounded(io.BufferedReader):
    """A file of which no more can be asked for than there is: `read` makes room for all that it is asked for."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or not 0 <= size <= left else size)


def find_state_dict(loaded: Any, file: str | Path) -> dict[str, Tensor]:
    """Find the tensors by name in what `file` holds, also nested under `state_dict`, `model_state_dict` or `model`.

    Raises:
        UserError: there are none.
    """
    found = loaded
    while isinstance(found, Mapping) and (key := next((k for k in _NESTED if isinstance(found.get(k), Mapping)), None)):
        found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        kind = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise UserError(
            f"{file}: no tensors by name in it, found {kind or 'nothing'}; "
            f"expected a state_dict, by itself or under {', '.join(_NESTED)}"
        )
    return {str(key): value for key, value in found.items()}


def call_builder(builder: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a module by `package.module:function` from keyword arguments.

    Raises:
        UserError: there is no such function, it fails, or gives no `nn.Module`.
    """
    module_name, colon, function_name = builder.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"builder '{builder}': expected package.module:function, such as timm:create_model")
    try:
        function: Any = importlib.import_module(module_name)
        for name in function_name.split("."):
            function = getattr(function, name)
    except Exception as error:  # foreign code runs at import: whatever it raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"builder '{builder}': cannot be imported ({reason}); "
            "expected package.module:function of an installed package"
        ) from error
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    try:
        module = function(**arguments)
    except Exception as error:  # foreign code: whatever it raises, the arguments are the user's
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"builder '{builder}': failed with the arguments ({text}): {type(error).__name__}: {reason}; mend them"
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"builder '{builder}': gives a {type(module).__name__}, expected an nn.Module; name what builds it"
        )
    return module


def build_foreign(builder: str, arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """Build a module to train as `call_builder` does, drawn from `seed`; PyTorch's own random state stays as it was.

    Raises:
        UserError: as `call_builder`, or the module cannot be trained here, see `require_trainable`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = call_builder(builder, arguments)
    require_trainable(module, builder)
    return module


def require_trainable(module: nn.Module, where: str) -> None:
    """Check that a step of `module` can be captured, and that tensors, with values, are all that its state is.

    Args:
        where: the start of error messages.

    Raises:
        UserError: a norm keeps a cumulative average, or an entry of the state is no tensor or has no values yet.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.momentum is None:
            raise UserError(  # PyTorch reads the count of batches on the host
                f"{where}: {type(layer).__name__} '{name}' has momentum=None, a cumulative average, which cannot be "
                "captured in a step; give it a number, such as PyTorch's 0.1"
            )
    for key, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{where}: '{key}' of its state is a {type(value).__name__}, expected a tensor, as files hold nothing "
                "else; make it a buffer, or leave get_extra_state out"
            )
        if is_lazy(value):
            raise UserError(
                f"{where}: '{key}' of a lazy module has no values yet; run one batch through the network in the builder"
            )


def load_state_dict(network: nn.Module, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Load into `network` what was trained in it, perhaps inside a wrapper that prefixes every key.

    Args:
        where: the start of error messages.

    Raises:
        UserError: keys or shapes differ.
    """
    expected = network.state_dict()
    # `module.` is DataParallel's, `_orig_mod.` compile's, `model.` Lightning's: while no key is one of the network's,
    # the prefix that all have in common goes.
    given = {key.replace("_orig_mod.", ""): value for key, value in state_dict.items()}
    while not given.keys() & expected.keys():
        heads = {key.partition(".")[0] for key in given}
        if len(heads) != 1 or not all("." in key for key in given):
            break
        given = {key.partition(".")[2]: value for key, value in given.items()}
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in expected]
    if missing or unexpected:
        raise UserError(
            f"{where}: missing {first_names(missing)}; unexpected {first_names(unexpected)}; "
            "expected the network that was trained: mend the builder or its arguments"
        )
    for key, value in given.items():
        if value.shape != expected[key].shape:
            raise UserError(
                f"{where}: {key} has shape {tuple(value.shape)} in the file, {tuple(expected[key].shape)} "
                "in the network; mend the builder's arguments"
            )
    network.load_state_dict(expected | given)
