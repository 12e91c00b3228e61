"""ONNX Runtime as an nn.Module."""

import json

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class OnnxEngine(nn.Module):
    """Runs an ONNX graph on the CPU with as many threads as torch has at the first call.

    The graph is a buffer (uint8), so that the module is copied, pickled to workers and saved like any other; `save`
    writes it as an .onnx file. Inputs and outputs are tensors; outputs have no gradient.

    Args:
        graph: bytes of an ONNX model.
        structure: how the outputs are nested, from `torch.utils._pytree.treespec_dumps`; None for one tensor.
    """

    graph: Tensor

    def __init__(self, graph: bytes, structure: str | None = None):
        super().__init__()
        self.register_buffer("graph", torch.from_numpy(np.frombuffer(graph, np.uint8).copy()))
        self.structure = structure
        self._spec = None if structure is None else pytree.treespec_loads(structure)
        self._session = None

    def __getstate__(self):
        return {**self.__dict__, "_session": None}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.graph = state_dict[prefix + "graph"].new_empty(state_dict[prefix + "graph"].shape)
        self._session = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def session(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            self._open()
        return self._session

    def _open(self, plain: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would starve torch's threads
        options.add_session_config_entry("session.x64quantprecision", "1")  # exact sums where x86 lacks VNNI
        options.log_severity_level = 4
        if plain:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        graph = self.graph.cpu().numpy().tobytes()
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._names = [entry.name for entry in self._session.get_inputs()]

    def forward(self, *inputs: Tensor):
        session = self.session
        feed = {name: x.detach().numpy(force=True) for name, x in zip(self._names, inputs, strict=True)}
        try:
            outputs = session.run(None, feed)
        except Fail:  # its rewriting for exact sums breaks some graphs with scales a row (1.31)
            self._open(plain=True)
            outputs = self._session.run(None, feed)
        outputs = [torch.from_numpy(y) for y in outputs]
        if self.structure is None:
            return outputs[0]
        return pytree.tree_unflatten(outputs, pytree.treespec_loads(self.structure))

    def save(self, path) -> int:
        """Writes the graph as an .onnx file and returns its bytes."""
        import onnx

        graph = onnx.load_from_string(self.graph.cpu().numpy().tobytes())
        onnx.helper.set_model_props(graph, {"structure": json.dumps(self.structure)})
        data = graph.SerializeToString()
        with open(path, "wb") as file:
            return file.write(data)

    @classmethod
    def load(cls, path) -> "OnnxEngine":
        """The engine in a file written by `save`, or any other .onnx file."""
        import onnx

        graph = onnx.load(path)
        properties = {entry.key: entry.value for entry in graph.metadata_props}
        return cls(graph.SerializeToString(), json.loads(properties.get("structure", "null")))
