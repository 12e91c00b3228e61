"""ONNX Runtime as an nn.Module."""

import json
from collections.abc import Mapping
from dataclasses import is_dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kit.core.protocols import Call, tree_map

TYPES = {name: getattr(torch, name) for name in "float double int64 int32 uint8 bool".split()}


class OnnxEngine(nn.Module):
    """Runs an ONNX graph on the CPU with as many threads as torch has at the first call.

    The graph is a buffer (uint8), so that the module is copied, pickled and saved like any other;
    `save` writes it as an .onnx file. Inputs are tensors by position; outputs have no gradient.

    Args:
        graph: bytes of an ONNX model.
        template: an output as the model gives it, whose tensors are the graph's in order.
    """

    graph: Tensor

    def __init__(self, graph: bytes, template=torch.empty(0)):
        super().__init__()
        self.register_buffer("graph", torch.from_numpy(np.frombuffer(graph, np.uint8).copy()))
        self.template = tree_map(lambda y: y.new_empty(0), template)
        self._session = self._inputs = None

    def __getstate__(self):
        return {**self.__dict__, "_session": None, "_inputs": None}

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
        self._inputs = self._session.get_inputs()

    def takes(self, call: Call) -> bool:
        """Whether a call is tensors by position, of the types and sizes that the graph is for."""
        self.session  # noqa: B018 opens it
        return (
            not call.kwargs
            and len(call.args) == len(self._inputs)
            and all(map(_fits, call.args, self._inputs))
        )

    def forward(self, *inputs: Tensor):
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail

        session, arrays = self.session, (x.detach().numpy(force=True) for x in inputs)
        feed = dict(zip((entry.name for entry in self._inputs), arrays, strict=True))
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
        """The engine in a file written by `save`, its outputs nested in tuples and dicts; of any
        other .onnx file the first output."""
        import onnx

        graph = onnx.load(path)
        properties = {entry.key: entry.value for entry in graph.metadata_props}
        return cls(graph.SerializeToString(), _template(json.loads(properties.get("outputs", "0"))))


def _fits(x, entry) -> bool:
    """Whether x is a tensor of the type and the fixed sizes of an input of a graph."""
    dtype = TYPES.get(entry.type.removeprefix("tensor(").removesuffix(")"))
    if not isinstance(x, Tensor) or x.dtype != dtype or x.ndim != len(entry.shape):
        return False
    sizes = zip(entry.shape, x.shape)
    return all(not isinstance(size, int) or size == length for size, length in sizes)


def _skeleton(value):
    """A nest of tensors in JSON: 0 for a tensor, a mapping for a dataclass, null for all else."""
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
