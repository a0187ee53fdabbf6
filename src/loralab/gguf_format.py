"""GGUF, the files of llama.cpp: an adapter as its LoRA, and a merged model in the place of its base's weights.

GGUF has names of its own for tensors, and for some models another order of rows (llama's q and k). Both are known to
the package gguf and to transformers, which reads GGUF: `Layout` asks them, and keeps no list of models.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loralab.disk import replacing
from loralab.errors import UserError
from loralab.schema import listed
from loralab.update import Update

ADAPTER, MODEL = "adapter.gguf", "model.gguf"  # what the files are called
BASE_SHA256 = "loralab.base_sha256"  # key of the hash of the base; others leave it unread
OTHER_NAMES = {"mistral": "llama"}  # model type of transformers -> what GGUF calls it, where the words differ
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # of the weights in a merged model
FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


class Words(NamedTuple):
    """What a merged model says of chats, where it is not what its base says."""

    template: str | None = None
    end: int | None = None  # token that ends an answer


AS_BASE = Words()


class Layout:
    """Where GGUF has the tensors of a model, and in which order it has their values."""

    def __init__(self, config: Any) -> None:
        """Ask for the layout of the model of a config of transformers. Raises UserError for one that GGUF has not."""
        require()
        import gguf
        from transformers.modeling_gguf_pytorch_utils import (
            GGUF_SUPPORTED_ARCHITECTURES,
            TENSOR_PROCESSORS,
            TensorProcessor,
        )

        kind = str(getattr(config, "model_type", None))
        wanted = _plain(OTHER_NAMES.get(kind, kind.removesuffix("_text")))
        found = {_plain(name): (arch, name) for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if wanted not in found or kind.removesuffix("_text") not in GGUF_SUPPORTED_ARCHITECTURES:
            known = ", ".join(sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}))
            raise UserError(f"model type {kind!r} has no layout in GGUF that is known here: expected one of {known}")
        arch, self.name = found[wanted]
        self.names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self.processor = TENSOR_PROCESSORS.get(self.name, TensorProcessor)(config=config.to_dict())

    def tensor(self, key: str) -> str | None:
        """GGUF's name of a tensor of the model, or None: "model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"."""
        path, _, last = key.rpartition(".")
        parts = path.split(".")
        for i in range(len(parts)):  # a part of a model has shorter paths, which still number the block
            if i and parts[i - 1].isdigit():
                break
            if (name := self.names.get_name(".".join(parts[i:]))) is not None:
                return f"{name}.{last}"
        return None

    def order(self, name: str, shape: tuple[int, ...]) -> Any:
        """In the shape that the model has: for each value its place among those of the tensor of a GGUF file.

        Raises UserError for a tensor whose values are not only put in another order.
        """
        size = int(np.prod(shape))
        found = self.processor.process(np.arange(size).reshape(shape), name).weights
        if found is None or found.size != size or not np.array_equal(np.sort(found, axis=None), np.arange(size)):
            raise UserError(f"{name} of GGUF is made of other values than the model's, so it is not written here")
        return found

    def rows(self, name: str, out: int, inner: int) -> Any:
        """(out,): for each row of W (out, in) its place among the rows of the tensor of a GGUF file.

        Raises UserError where GGUF has other rows, to which no B (out, r) can be given.
        """
        found = self.order(name, (out, inner))
        for at in (found, found.T):  # a Conv1D has W transposed
            if at.shape == (out, inner) and np.array_equal(at, at[:, :1] + np.arange(inner)):
                return at[:, 0] // inner
        raise UserError(f"{name} of GGUF has other rows than the model's layer, so its LoRA is not written here")


def _plain(name: str) -> str:
    return re.sub(r"[-_]", "", name)


def require() -> None:
    """Raise UserError where the package gguf is missing."""
    if find_spec("gguf") is None:
        raise UserError("GGUF files need the package gguf: pip install 'loralab[gguf]'")


def write_adapter(folder: Path, config: Any, updates: Mapping[str, Update], base: Mapping[str, Any], name: str) -> Path:
    """Write `adapter.gguf`, the LoRA of llama.cpp, into a folder, and return its path.

    `updates`: path of a linear layer -> its lowered update without a gain; `base`: name and sha256 of the base.
    llama.cpp adds alpha / r B A with the r of each tensor, so B (out, r) is divided by that here.
    Raises UserError for layers that GGUF has no tensor for, and if the file cannot be written.
    """
    layout = Layout(config)
    places = {path: layout.tensor(f"{path}.weight") for path in updates}
    if without := [path for path, place in places.items() if place is None]:
        raise UserError(f"GGUF has no tensor for {listed(without, 3)} ({len(without)} layers): exclude them, or merge")
    import gguf

    alpha = max(len(u.A) for u in updates.values())
    tensors: dict[str, Any] = {}
    for path, u in updates.items():
        A, B = (t.detach().float().cpu().numpy() for t in (u.A, u.B))  # (r, in), (out, r)
        placed = np.empty_like(B)
        placed[layout.rows(str(places[path]), len(B), A.shape[1])] = B * (len(A) / alpha)
        tensors |= {f"{places[path]}.lora_a": np.ascontiguousarray(A), f"{places[path]}.lora_b": placed}
    file = folder / ADAPTER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            writer = gguf.GGUFWriter(temporary, layout.name)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_name(name)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, str(base["name"]))
            writer.add_string(BASE_SHA256, str(base["sha256"]))
            for key, tensor in tensors.items():
                writer.add_tensor(key, tensor)
            _finish(writer)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    return file


def write_model(
    folder: Path,
    base_file: Path,
    config: Any,
    changed: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    words: Words = AS_BASE,
) -> Path:
    """Write `model.gguf`: the file of a base with the `changed` tensors, name in the model -> value, in `dtype`.

    The header is that of the base, settings and tokens, with these `words`. What did not change keeps its bits.
    Raises UserError for a tensor that GGUF has no name for, and if the file cannot be written.
    """
    layout = Layout(config)
    places = {key: layout.tensor(key) for key in changed}
    if without := [key for key, place in places.items() if place is None]:
        raise UserError(f"GGUF has no tensor for {listed(without, 3)}: write a folder of transformers instead")
    import gguf

    reader = gguf.GGUFReader(base_file)
    there = {tensor.name: tensor for tensor in reader.tensors}
    new = {str(place): changed[key] for key, place in places.items()}
    file = folder / MODEL
    try:
        with replacing(file) as temporary:
            writer = gguf.GGUFWriter(temporary, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
            writer.data_alignment = reader.alignment
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != gguf.Keys.General.ARCHITECTURE:
                    of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), field.types[0], of_items)
            if gguf.Keys.General.FILE_TYPE in reader.fields:
                writer.kv_data[0].pop(gguf.Keys.General.FILE_TYPE)
                writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
            _say(writer, words)
            for key in {**there, **new}:
                if key in new:
                    shape = tuple(int(n) for n in there[key].shape[::-1]) if key in there else tuple(new[key].shape)
                    values = _placed(layout.order(key, shape), new[key], shape)
                    kind = gguf.GGMLQuantizationType[KINDS[dtype] if len(shape) > 1 else "F32"]  # vectors stay whole
                    writer.add_tensor(key, gguf.quantize(values, kind), raw_dtype=kind)
                else:
                    writer.add_tensor(key, there[key].data, raw_dtype=there[key].tensor_type)
            _finish(writer)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    return file


def _say(writer: Any, words: Words) -> None:
    """Put the words of a merged model in the place of those of its base."""
    import gguf

    names = gguf.Keys.Tokenizer
    for key, value, add in (
        (names.CHAT_TEMPLATE, words.template, writer.add_chat_template),
        (names.EOT_ID, words.end, writer.add_eot_token_id),
    ):
        if value is not None:
            writer.kv_data[0].pop(key, None)
            add(value)


def _placed(order: Any, tensor: Tensor, shape: tuple[int, ...]) -> Any:
    """The values of a tensor of the model as a tensor of this shape of a GGUF file, in float32."""
    values = np.empty(order.size, np.float32)
    values[order.reshape(-1)] = tensor.detach().float().cpu().numpy().reshape(-1)
    return values.reshape(shape)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
