"""What leaves as GGUF is run by llama.cpp itself: the logits are those of the model that was trained."""

import ctypes

import numpy as np
import pytest
import torch
from test_cli import cli  # noqa: F401 (a fixture)
from test_gguf import EXPORTED, WORDS, attached, attached_smollm2, load, write

from loralab.models import gguf_file

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

IDS = [3, 9, 4, 22, 13, 7, 28]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    @llama_cpp.llama_log_callback
    def say_nothing(level, text, data):
        pass

    llama_cpp.llama_log_set(say_nothing, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


def by_llama_cpp(base, ids, adapter=None):
    """Return the logits (tokens, vocabulary) of llama.cpp, with an adapter of scale 1; keys and values in float32."""
    ask = llama_cpp.llama_model_default_params()
    ask.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(str(base).encode(), ask)
    ask = llama_cpp.llama_context_default_params()
    ask.n_ctx = ask.n_batch = ask.n_ubatch = 64
    ask.n_threads = ask.n_threads_batch = 1
    ask.type_k = ask.type_v = llama_cpp.GGML_TYPE_F32
    ask.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, ask)
    if adapter is not None:
        lora = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
        assert lora
        assert not llama_cpp.llama_set_adapters_lora(context, (type(lora) * 1)(lora), 1, (ctypes.c_float * 1)(1.0))
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = (llama_cpp.llama_get_logits_ith(context, i) for i in range(len(ids)))
    logits = np.stack([np.ctypeslib.as_array(row, shape=(size,)).copy() for row in rows])
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


def ours(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "tiny.gguf", kind="F32")
    return tmp_path / "base"


@pytest.mark.parametrize(("method", "given"), EXPORTED)
def test_llama_cpp_adds_the_adapter(method, given, base, tmp_path):
    model, adapters = attached(base, method, **{key: v() if callable(v) else v for key, v in given.items()})
    right, before = ours(model, IDS), ours(load(base), IDS)
    adapters.export(tmp_path / "out", layout="gguf", base_name="some/base")
    np.testing.assert_allclose(by_llama_cpp(base / "tiny.gguf", IDS), before, rtol=0, atol=1e-4)
    found = by_llama_cpp(base / "tiny.gguf", IDS, tmp_path / "out" / "adapter.gguf")
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-4)
    assert np.abs(right - before).max() > 0.1


@pytest.mark.parametrize(("method", "given"), [*EXPORTED, ("dora", {"rank": 3}), ("lora", {"tokens": [3, 9]})])
def test_llama_cpp_runs_the_merged_model(method, given, base, cli, tmp_path):  # noqa: F811
    """So do the methods that have no GGUF adapter, and single tokens."""
    model, adapters = attached(base, method, **{key: v() if callable(v) else v for key, v in given.items()})
    adapters.save(tmp_path / "adapter")
    code, _, err = cli("merge", tmp_path / "adapter", "--model", base, "--out", "merged", "--gguf")
    assert code == 0, err
    assert len(WORDS) == ours(model, IDS).shape[-1]
    found = by_llama_cpp(tmp_path / "merged" / "model.gguf", IDS)
    np.testing.assert_allclose(found, ours(model, IDS), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_llama_cpp_runs_smollm2_merged_and_with_its_adapter(cli, tmp_path):  # noqa: F811
    """llama.cpp rounds activations beside weights of four bits, so differences are measured by the adapter's share."""
    model, adapters = attached_smollm2(tmp_path / "adapter", std=0.04)
    ids = [504, 2044, 282, 4649, 314, 260, 3575, 28, 284, 335]
    right = ours(model, ids)
    with adapters.use(None):
        before = ours(model, ids)
    for command, *flags in (("merge", "--out", "merged"), ("export", "--out", "out")):
        code, _, err = cli(command, tmp_path / "adapter", "--model", "smollm2", *flags, "--gguf")
        assert code == 0, err
    found = by_llama_cpp(tmp_path / "merged" / "model.gguf", ids)
    file = gguf_file("smollm2")
    added = by_llama_cpp(file, ids, tmp_path / "out" / "adapter.gguf")
    share = np.linalg.norm(right - before)  # of the adapter
    assert share > 2 * np.linalg.norm(by_llama_cpp(file, ids) - before)
    assert np.linalg.norm(found - right) < 0.1 * share  # the output layer, which is not adapted, stays in four bits
    assert np.linalg.norm(added - right) < 0.5 * share
