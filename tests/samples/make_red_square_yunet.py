"""Writes `red_square_yunet.onnx`: YuNet's inputs and outputs, with eyes for coloured squares only.

It sees a red square above a blue one as a face, of 2 to 5 cells of 8, 16 or 32 pixels, and puts
eyes, nose and mouth at fixed places in it. Tests read the file; this program needs `onnx` and
runs only to make it anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

STRIDES = (8, 16, 32)
# x and y from the middle, in sides of the square: right eye, left eye, nose, corners of the mouth.
LANDMARKS = ((-0.2, -0.15), (0.2, -0.15), (0.0, 0.05), (-0.15, 0.25), (0.15, 0.25))


def window_weights() -> np.ndarray:
    """(6, 2, 7, 7): red inside, red at the rim, red in all, its moments, blue below."""
    rows, columns = np.mgrid[-3:4, -3:4].astype(np.float32)
    far = np.maximum(abs(rows), abs(columns))
    red = np.stack([(far <= 1) / 9, (far == 3) / 24, np.ones_like(far), columns, rows, 0 * far])
    blue = np.zeros_like(red)
    blue[5] = ((rows == 3) & (abs(columns) <= 1)) / 3
    return np.stack([red, blue], axis=1).astype(np.float32)


WEIGHTS = {
    # Blue, green, red to how red and how blue.
    "colours": np.array([[-1, -1, 1], [1, -1, -1]], np.float32).reshape(2, 3, 1, 1) / 255,
    "window": window_weights(),
    # Red inside counts, red at the rim does not belong to a small square.
    "likeness": np.array([1.5, -2, 0, 0, 0, 0], np.float32).reshape(1, 6, 1, 1),
    "body": np.array([0, 0, 0, 0, 0, 2], np.float32).reshape(1, 6, 1, 1),
    "mass": np.array([0, 0, 1, 0, 0, 0], np.float32).reshape(1, 6, 1, 1),
    "moments": np.eye(6, dtype=np.float32)[3:5].reshape(2, 6, 1, 1),
    "both_sides": np.ones((2, 1, 1, 1), np.float32),
    "offsets": np.array(LANDMARKS, np.float32).reshape(10, 1, 1, 1),
    "to_points": np.tile(np.eye(2, dtype=np.float32), (5, 1)).reshape(10, 2, 1, 1),
    "least": np.array([1e-3], np.float32),
    "half": np.array([0.5], np.float32),
    "low": np.array(0, np.float32),
    "high": np.array(1, np.float32),
    "rows_of_1": np.array([1, -1, 1], np.int64),
    "rows_of_4": np.array([1, -1, 4], np.int64),
    "rows_of_10": np.array([1, -1, 10], np.int64),
}


def level(stride: int) -> list[NodeProto]:
    """The nodes that look for squares in cells of so many pixels."""

    def node(kind: str, output: str, *inputs: str, **attributes: object) -> NodeProto:
        names = [name if name in WEIGHTS or name == "coloured" else at(name) for name in inputs]
        return helper.make_node(kind, names, [at(output)], **attributes)

    def at(name: str) -> str:
        return f"{name}_{stride}"

    cell = [stride, stride]
    nodes = [
        node("AveragePool", "cells", "coloured", kernel_shape=cell, strides=cell),
        node("Conv", "seen", "cells", "window", pads=[3, 3, 3, 3]),
        node("Conv", "like", "seen", "likeness"),
        node("Clip", "likely", "like", "low", "high"),
        node("Conv", "below", "seen", "body"),
        node("Clip", "standing", "below", "low", "high"),
        node("Mul", "score", "likely", "standing"),
        node("Conv", "all_red", "seen", "mass"),
        node("Add", "area", "all_red", "least"),
        node("Sqrt", "side", "area"),
        node("Conv", "area_twice", "area", "both_sides"),
        node("Conv", "moment", "seen", "moments"),
        node("Div", "shift", "moment", "area_twice"),
        node("Add", "middle", "shift", "half"),
        node("Log", "log_side", "side"),
        node("Conv", "log_sides", "log_side", "both_sides"),
        node("Concat", "box", "middle", "log_sides", axis=1),
        node("Conv", "middles", "middle", "to_points"),
        node("Conv", "away", "side", "offsets"),
        node("Add", "points", "middles", "away"),
    ]
    outputs = (("cls", "score", 1), ("obj", "score", 1), ("bbox", "box", 4), ("kps", "points", 10))
    for output, source, width in outputs:
        nodes.append(node("Transpose", f"last_{output}", source, perm=[0, 2, 3, 1]))
        nodes.append(node("Reshape", output, f"last_{output}", f"rows_of_{width}"))
    return nodes


def network() -> onnx.ModelProto:
    """The whole model, with the names that OpenCV asks YuNet for."""
    nodes = [
        helper.make_node("Conv", ["input", "colours"], ["signed"]),
        helper.make_node("Relu", ["signed"], ["coloured"]),
    ]
    outputs = []
    for stride in STRIDES:
        nodes += level(stride)
        for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            shape = [1, (640 // stride) ** 2, width]
            outputs.append(
                helper.make_tensor_value_info(f"{name}_{stride}", TensorProto.FLOAT, shape)
            )
    graph = helper.make_graph(
        nodes,
        "red_square_yunet",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 640, 640])],
        outputs,
        [numpy_helper.from_array(values, name) for name, values in WEIGHTS.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model


if __name__ == "__main__":
    onnx.save(network(), Path(__file__).with_name("red_square_yunet.onnx"))
