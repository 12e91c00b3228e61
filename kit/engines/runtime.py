"""ONNX Runtime as an nn.Module."""

import json
from collections.abc import Mapping
from dataclasses import is_dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kit.core.protocols import Call, tree_map

TYPES = {"float": torch.float32, "double": torch.float64, "int64": torch.int64, "int32": torch.int32,
         "uint8": torch.uint8, "bool": torch.bool}  # fmt: skip


class OnnxEngine(nn.Module):
    """Runs an ONNX graph on the CPU with as many threads as torch has at the first call.

    The graph is a buffer (uint8), so that the module is copied, pickled and saved like any other; `save`
    writes it as an .onnx file. Inputs are tensors by position; outputs have no gradient.

    Args:
        graph: bytes of an ONNX model.
        template: an output as the model gives it, whose tensors stand for those of the graph in order.
    """

    graph: Tensor

    def __init__(self, graph: bytes, template=torch.empty(0)):
        super().__init__()
        self.register_buffer("graph", torch.from_numpy(np.frombuffer(graph, np.uint8).copy()))
        self.template = tree_map(lambda y: y.new_empty(0), template)
        self._session = None

    def __getstate__(self):
        return {**self.__dict__, "_session": None}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.graph = state_dict[prefix + "graph"].new_empty(state_dict[prefix + "graph"].shape)
        self._session = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def session(self):
        """The onnxruntime.InferenceSession."""
        if self._session is None:
            self._open()
        return self._session

    def _open(self, plain: bool = False) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin would starve torch's; sums are to be exact where x86 lacks VNNI.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 4
        if plain:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        graph, provider = self.graph.cpu().numpy().tobytes(), "CPUExecutionProvider"
        self._session = ort.InferenceSession(graph, options, providers=[provider])
        self._inputs = [(entry.name, TYPES.get(entry.type[7:-1]), [d if isinstance(d, int) else None for d in entry.shape])
                        for entry in self._session.get_inputs()]  # fmt: skip

    def takes(self, call: Call) -> bool:
        """Whether a call is tensors by position, of the types and sizes that the graph is for."""
        self.session  # noqa: B018 opens it
        return (
            not call.kwargs
            and len(call.args) == len(self._inputs)
            and all(_fits(x, *entry) for x, (_, *entry) in zip(call.args, self._inputs))
        )

    def forward(self, *inputs: Tensor):
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail

        session, arrays = self.session, (x.detach().numpy(force=True) for x in inputs)
        feed = dict(zip((name for name, *_ in self._inputs), arrays, strict=True))
        try:
            outputs = session.run(None, feed)
        except Fail:  # its rewriting for exact sums breaks some graphs with scales a row (1.31)
            self._open(plain=True)
            outputs = self._session.run(None, feed)
        found = map(torch.from_numpy, outputs)
        return tree_map(lambda _: next(found), self.template)

    def save(self, path) -> int:
        """Writes the graph as an .onnx file and returns its bytes."""
        import onnx

        graph = onnx.load_from_string(self.graph.cpu().numpy().tobytes())
        onnx.helper.set_model_props(graph, {"outputs": json.dumps(_skeleton(self.template))})
        data = graph.SerializeToString()
        with open(path, "wb") as file:
            return file.write(data)

    @classmethod
    def load(cls, path) -> "OnnxEngine":
        """The engine in a file written by `save` (outputs nest in tuples and dicts), or the first output
        of any other .onnx file."""
        import onnx

        graph = onnx.load(path)
        properties = {entry.key: entry.value for entry in graph.metadata_props}
        return cls(graph.SerializeToString(), _template(json.loads(properties.get("outputs", "0"))))


def _fits(x, dtype: torch.dtype | None, shape: list[int | None]) -> bool:
    same = isinstance(x, Tensor) and dtype in (None, x.dtype) and x.ndim == len(shape)
    return same and all(size in (None, length) for size, length in zip(shape, x.shape))


def _skeleton(value):
    """A nest of tensors in JSON: 0 for a tensor, a mapping also for a dataclass, null for all else."""
    if isinstance(value, Tensor):
        return 0
    if isinstance(value, Mapping):
        return {key: _skeleton(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_skeleton(item) for item in value]
    return _skeleton(vars(value)) if is_dataclass(value) else None


def _template(skeleton):
    if isinstance(skeleton, dict):
        return {key: _template(item) for key, item in skeleton.items()}
    if isinstance(skeleton, list):
        return tuple(_template(item) for item in skeleton)
    return None if skeleton is None else torch.empty(0)
