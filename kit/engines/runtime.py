"""ONNX Runtime as an nn.Module."""

import json
from dataclasses import is_dataclass

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from torch import Tensor, nn

from kit.core.protocols import Call, tensors_of, tree_map

TENSOR = {"tensor": 0}  # stands for a tensor in the outputs that a file describes


class OnnxEngine(nn.Module):
    """Runs an ONNX graph on the CPU with as many threads as torch has at the first call.

    The graph is a buffer (uint8), so that the module is copied, pickled and saved like any other;
    `save` writes it as an .onnx file. Outputs have no gradient.

    Args:
        graph: bytes of an ONNX model.
        template: an output as the model gives it, whose tensors stand for the graph's in order.
        call: how the model is called, whose tensors stand for the graph's inputs; without it,
            inputs are tensors by position, or by the names that the graph gives them.
    Calls of another form, or with tensors that the graph does not take, raise an error.
    """

    graph: Tensor

    def __init__(self, graph: bytes, template=torch.empty(0), call: Call | None = None):
        super().__init__()
        self.register_buffer("graph", torch.from_numpy(np.frombuffer(graph, np.uint8).copy()))
        self.template = tree_map(lambda y: y.new_empty(0), template)
        self.form = None if call is None else form_of(call)
        self.session: onnxruntime.InferenceSession | None = None

    def __getstate__(self):
        return {**self.__dict__, "session": None}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.graph, self.session = torch.empty_like(state_dict[prefix + "graph"]), None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _open(self, **settings) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin would starve torch's; sums are to be exact where x86 lacks VNNI.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 4
        for name, value in settings.items():
            setattr(options, name, value)
        graph, providers = self.graph.cpu().numpy().tobytes(), ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(graph, options, providers=providers)
        self.names = [entry.name for entry in self.session.get_inputs()]

    def forward(self, *args, **kwargs):
        if self.session is None:
            self._open()
        if self.form is None:
            feed = dict(zip(self.names, args)) | kwargs
        else:
            order = {key: kwargs[key] for key in self.form.kwargs if key in kwargs}
            if form_of(call := Call(args, order | kwargs)) != self.form:
                raise ValueError("the graph was made for another form of call: export it for this")
            feed = dict(zip(self.names, tensors_of(call), strict=True))
        feed = {name: x.detach().numpy(force=True) for name, x in feed.items()}
        try:
            outputs = self.session.run(None, feed)
        except Fail:  # its rewriting for exact sums breaks some graphs with scales a row (1.31)
            disabled = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._open(graph_optimization_level=disabled)
            outputs = self.session.run(None, feed)
        found = map(torch.from_numpy, outputs)
        return tree_map(lambda _: next(found), self.template)

    def save(self, path) -> int:
        """Writes the graph as an .onnx file and returns its bytes."""
        import onnx

        graph = onnx.load_from_string(self.graph.cpu().numpy().tobytes())
        template = json.dumps(self.template, default=_plain)
        onnx.helper.set_model_props(graph, {"outputs": template})
        data = graph.SerializeToString()
        with open(path, "wb") as file:
            return file.write(data)

    @classmethod
    def load(cls, path) -> "OnnxEngine":
        """The engine in a file written by `save`, whose outputs nest in lists and dicts, or the
        first output of any other .onnx file."""
        import onnx

        graph = onnx.load(path)
        properties = {entry.key: entry.value for entry in graph.metadata_props}
        text = properties.get("outputs", json.dumps(TENSOR))
        template = json.loads(text, object_hook=lambda d: torch.empty(0) if d == TENSOR else d)
        return cls(graph.SerializeToString(), template)


def form_of(call: Call) -> Call:
    """A call with the class Tensor for each tensor: what of it a graph holds as constants."""
    return tree_map(lambda x: Tensor, call)


def _plain(value):
    """A tensor or a dataclass in JSON's own types; null for all else."""
    if isinstance(value, Tensor):
        return TENSOR
    return vars(value) if is_dataclass(value) else None
