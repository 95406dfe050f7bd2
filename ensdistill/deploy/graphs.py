"""Graphs of a network: ONNX by onnxruntime, and PyTorch's own exported programs. The number of images stays free."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ensdistill.deploy.check import check
from ensdistill.deploy.interface import Deployed, Interface
from ensdistill.models import Classifier
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write

DEFAULT_OPSET = 18
"""The one that PyTorch's exporter writes by itself; others are converted to."""
METADATA_FILE = "ensdistill.json"
"""Name of the metadata inside a .pt2 file, for `torch.export.load(file, extra_files={METADATA_FILE: ""})`."""
_MAX_ONNX_BYTES = (1 << 31) - 1


def require_onnx() -> None:
    """Check that what writes and runs ONNX files is installed, before any work.

    Raises:
        UserError: a package is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--to onnx: {package} cannot be imported ({error}); it comes with the extra `export`: "
                "pip install 'ensdistill[export]'"
            ) from error


def write_onnx(
    path: Path, classifier: Classifier, interface: Interface, metadata: Mapping[str, str], opset: int, where: str
) -> float:
    """Write an ONNX file with the input `images` and one output, and return the largest |Δp| of it.

    Args:
        metadata: texts by name, written into the file.
        where: the network's file, for messages.

    Raises:
        UserError: the network cannot be exported, or the file does not compute what the network does.
    """
    require_onnx()
    import onnx
    import onnxruntime

    program = _program(classifier, interface, where)
    try:
        with _silent():
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=[interface.gives],
                verbose=False,
            )
        model = exported.model_proto
    except Exception as error:  # the exporter's own kinds, for what it cannot express
        raise _cannot(where, error, "ONNX") from error
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found.get("") != opset:
        raise UserError(
            f"{where}: --opset {opset}: PyTorch wrote opset {found.get('')}; leave --opset out, or give that"
        )
    _tidy(model)
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    if model.ByteSize() > _MAX_ONNX_BYTES:
        raise UserError(f"{where}: larger than the 2 GB that an ONNX file holds; use --to pt2")
    onnx.checker.check_model(model)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
        return check(
            where, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), classifier, interface
        )


def _tidy(model: Any) -> None:
    """Call the free axis `batch`, and take out the notes of the exporter: they name files of this machine."""
    graph = model.graph
    free = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == free:
                dim.dim_param = "batch"
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    for function in model.functions:
        for part in (function, *function.node):
            del part.metadata_props[:]
            part.doc_string = ""


def write_pt2(
    path: Path, classifier: Classifier, interface: Interface, metadata: Mapping[str, str], where: str
) -> float:
    """Write a .pt2 file, `torch.export.load(file).module()` runs it, and return the largest |Δp| of it.

    Args and errors: as `write_onnx`.
    """
    program = _program(classifier, interface, where)
    content = io.BytesIO()  # a file object: PyTorch wants names that end in .pt2
    try:
        with _silent():
            torch.export.save(program, content, extra_files={METADATA_FILE: json.dumps(dict(metadata))})
    except Exception as error:
        raise _cannot(where, error, "a .pt2 file") from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())
        with temporary.open("rb") as stream, _silent():
            loaded = torch.export.load(stream).module()
        return check(where, loaded, classifier, interface)


def _program(classifier: Classifier, interface: Interface, where: str) -> ExportedProgram:
    """Record the network, its number of images free."""
    H, W, C = interface.info.image_shape
    two = interface.images(torch.zeros((2, C, H, W), dtype=torch.uint8))
    module = Deployed(classifier, interface).eval()
    try:
        with _silent(), torch.no_grad():
            program = torch.export.export(module, (two,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as error:  # somebody else's network may do anything
        raise _cannot(where, error, "a graph") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def _cannot(where: str, error: Exception, what: str) -> UserError:
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    return UserError(
        f"{where}: PyTorch cannot make {what} of this network ({type(error).__name__}: {reason}); export its weights: "
        "--to safetensors"
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporters' advice to their developers off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
