"""What an adapter learned, against numpy's dense singular values over every method."""

import json
import math

import numpy as np
import pytest
import torch
import zoo
from archs import build, shake
from test_laws import ADAPTED, adapted
from transformers import LlamaConfig, LlamaForCausalLM

import loralab
from loralab import analysis
from loralab.analysis import Layer, overlaps, spectra, updates
from loralab.recipe import NAMED
from loralab.update import Dense, Update

N_OUT, N_IN, RANK = 13, 29, 3


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(seed, rank=RANK):
    return Update(random(rank, N_IN, seed=seed), random(N_OUT, rank, seed=seed + 100))


def saved(name, tmp_path, seed=2):
    """(path -> (W, D) by the slow way, adapter folder) of a shaken adapter."""
    _, adapters = adapted(name)
    shake(adapters, "a", seed)
    slow, plain = {}, adapters.merge("a", "float32")
    for path, layer in adapters.layers.items():
        u = layer.lower("a")
        W = layer.weight.detach().double().numpy()
        merged = plain.get_submodule(path).weight.detach().double().numpy()
        g = 1 if u.gain is None else u.gain.detach().double().numpy()[:, None]
        slow[path] = (W, merged / g - W)
    return slow, adapters.save(tmp_path / name)


# ---- spectra -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTED)
def test_the_spectrum_of_every_method_is_that_of_the_dense_update(name, tmp_path):
    slow, folder = saved(name, tmp_path)
    found = analysis.spectra(analysis.updates(folder, build("bert")))
    assert [s.path for s in found] == list(slow)
    norms = {path: np.linalg.norm(D) for path, (_, D) in slow.items()}
    for s in found:
        _, D = slow[s.path]
        values = np.linalg.svd(D, compute_uv=False)
        np.testing.assert_allclose(s.values, values[: len(s.values)], rtol=1e-3, atol=1e-4 * values[0])
        assert (values[len(s.values) :] < 1e-5 * values[0]).all()
        assert s.shape == D.shape
        assert s.share == pytest.approx(norms[s.path] ** 2 / sum(n**2 for n in norms.values()), rel=1e-3)
        p = values / values.sum()
        assert s.effective_rank == pytest.approx(np.exp(-(p * np.log(p + 1e-300)).sum()), rel=1e-2)
        assert (s.gain is not None) == NAMED[name][0].gain


@pytest.mark.parametrize("name", ADAPTED)
def test_without_a_base_the_spectrum_is_the_same_or_refused(name, tmp_path):
    _, folder = saved(name, tmp_path)
    over = analysis.spectra(analysis.updates(folder, build("bert")))
    recipe = NAMED[name][0]
    if not recipe.low_rank or recipe.factors.constants([(1, 1)]):  # what is drawn over the sizes of the base
        with pytest.raises(loralab.UserError, match="give --model"):
            analysis.updates(folder)
        return
    for alone, s in zip(analysis.spectra(analysis.updates(folder)), over, strict=True):
        assert (alone.path, alone.shape) == (s.path, s.shape)
        np.testing.assert_allclose(alone.values, s.values)
        assert (alone.gain, alone.amplification, alone.along) == (None, None, None)


def test_full_fine_tuning_has_a_dense_update_over_its_base(tmp_path):
    model = build("bert")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    adapters = loralab.attach(model, "full", name="a", head=True)
    shake(adapters, "a")
    after = {key: p.detach() for key, (_, p) in adapters.tensors("a").items()}
    folder = adapters.save(tmp_path / "full")
    found = analysis.spectra(analysis.updates(folder, build("bert")))
    assert len(found) == 13  # six linear layers in each of two blocks, and the pooler
    for s in found:
        values = torch.linalg.svdvals((after[f"{s.path}.weight"] - before[f"{s.path}.weight"]).double())
        torch.testing.assert_close(torch.tensor(s.values, dtype=torch.float64), values, rtol=1e-4, atol=1e-5)
    with pytest.raises(loralab.UserError, match="give --model"):
        analysis.updates(folder)


@pytest.mark.parametrize("name", ["head", "bitfit"])
def test_what_changes_no_weight_has_no_update(name, tmp_path, capsys):
    folder = loralab.attach(build("bert"), name, name="a", head=True).save(tmp_path / name)
    assert analysis.updates(folder, build("bert")) == analysis.updates(folder) == {}
    assert shown(capsys, "inspect", folder)[::2] == (0, "")
    assert "nothing to draw" in shown(capsys, "inspect", folder, "--plot", tmp_path / "x.png")[2]


def test_effective_rank_is_the_number_of_equal_values():
    for k in (1, 4, 9):
        assert analysis.effective_rank(torch.tensor([2.5] * k + [0.0] * 3)) == pytest.approx(k)
    assert analysis.effective_rank(torch.zeros(5)) == 0
    assert 1 < analysis.effective_rank(torch.tensor([5.0, 1.0, 0.1])) < 3


def test_an_update_of_zero_has_a_share_of_zero_and_no_direction():
    zero = Update(random(RANK, N_IN, seed=1), torch.zeros(N_OUT, RANK, dtype=torch.float64))
    layers = {"zero": Layer(zero, random(N_OUT, N_IN, seed=7)), "not": Layer(update(3), random(N_OUT, N_IN, seed=8))}
    zero_s, other = analysis.spectra(layers)
    assert (zero_s.share, zero_s.norm, zero_s.effective_rank, zero_s.amplification) == (0, 0, 0, None)
    assert other.share == pytest.approx(1)
    assert [o.path for o in analysis.overlaps(layers, layers)] == ["not"]


# ---- subspaces -----------------------------------------------------------------------------------------------------


def slow_phi(X, Y, i, j):
    """The paper's formula, letter by letter."""
    return np.linalg.norm(X[:, :i].T @ Y[:, :j], "fro") ** 2 / min(i, j)


def test_similarity_is_the_formula_of_the_paper():
    one, other = update(1, rank=3), update(2, rank=5)
    a, b = (np.linalg.svd(u.matrix().numpy()) for u in (one, other))
    (found,) = analysis.overlaps({"x": Layer(one, None)}, {"x": Layer(Dense(other.matrix()), None), "y": None})
    assert found.reads.shape == found.writes.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            assert found.writes[i, j] == pytest.approx(slow_phi(a[0], b[0], i + 1, j + 1))
            assert found.reads[i, j] == pytest.approx(slow_phi(a[2].T, b[2].T, i + 1, j + 1))


def test_similarity_with_itself_is_one_and_of_random_directions_what_chance_gives():
    same = analysis.overlaps({"x": Layer(update(1), None)}, {"x": Layer(update(1), None)})[0]
    torch.testing.assert_close(same.reads.diagonal(), torch.ones(RANK, dtype=torch.float64))
    drawn = [torch.linalg.qr(random(N_IN, 6, seed=k))[0] for k in range(400)]
    phi = torch.stack([analysis.similarity(X, Y[:, :4]) for X, Y in zip(drawn[::2], drawn[1::2], strict=True)])
    i, j = torch.arange(1, 7)[:, None], torch.arange(1, 5)
    expected = torch.maximum(i, j) / N_IN
    error = 5 * phi.std(0) / math.sqrt(len(phi))
    assert ((phi.mean(0) - expected).abs() < error).all()


def test_the_mean_of_unlike_sizes_is_over_those_that_have_an_entry():
    found = analysis.mean([torch.tensor([[1.0, 3.0]]), torch.tensor([[3.0], [7.0]])])
    assert found[0].tolist() == [2, 3]
    assert found[1, 0] == 7


def test_adapters_that_share_no_layer_or_no_base_are_refused():
    small = {"x": Layer(Update(random(2, 5, seed=1), random(4, 2, seed=2)), None)}
    with pytest.raises(loralab.UserError, match="no layer in common"):
        analysis.overlaps({"x": Layer(update(1), None)}, {"y": Layer(update(1), None)})
    with pytest.raises(loralab.UserError, match="13 x 29 and 4 x 5"):
        analysis.overlaps({"x": Layer(update(1), None)}, small)


# ---- against W -----------------------------------------------------------------------------------------------------


def test_amplification_is_that_of_the_paper_and_along_is_one_for_random_directions():
    u, W = update(5), random(N_OUT, N_IN, seed=6)
    D, top = u.matrix().numpy(), 2
    U, s, Vh = np.linalg.svd(D)
    along = np.linalg.norm(U[:, :top].T @ W.numpy() @ Vh[:top].T, "fro")
    (found,) = analysis.spectra({"x": Layer(u, W)}, top)
    assert found.amplification == pytest.approx(np.linalg.norm(s[:top]) / along)
    ratios = [analysis.spectra({"x": Layer(update(k), W)})[0].along for k in range(10, 410)]
    squares = np.square(ratios)
    assert abs(squares.mean() - 1) < 5 * squares.std() / math.sqrt(len(squares))


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tiny, tmp_path):
    """Folders of two shaken adapters of the tiny model, of ranks 3 and 5."""
    from loralab import models

    def make(name, rank, seed):
        model, _ = models.classifier(str(tiny), 2, False, torch.float32, seed=0)
        adapters = loralab.attach(model, "lora", name="a", rank=rank, head=True)
        shake(adapters, "a", seed)
        return adapters.save(tmp_path / name)

    return make("one", 3, 1), make("other", 5, 2)


def shown(capsys, *argv):
    from loralab.cli import main

    code = main([str(part) for part in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_prints_and_draws_what_the_library_found(two, tiny, tmp_path, capsys, monkeypatch):
    one, other = two
    found = {s.path: s for s in analysis.spectra(analysis.updates(one))}
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = shown(capsys, "inspect", one, "--model", tiny, "--plot", tmp_path / "one.png")
    assert code == 0
    assert "rank 3" in out  # what it printed before
    assert "amplified" in out
    s = found["bert.encoder.layer.1.attention.self.key"]
    (line,) = [line for line in out.splitlines() if line.startswith("1 attention.self.key")]
    assert f"{s.norm:.3g}" in line
    assert f"{s.effective_rank:.2f}" in line
    told = json.loads(shown(capsys, "inspect", one, "--json")[1])["update"]
    assert told["layers"][s.path]["values"] == pytest.approx(s.values)
    code, out, _ = shown(capsys, "inspect", one, "--against", other, "--plot", tmp_path / "two.png")
    assert code == 0
    assert "chance" in out
    told = json.loads(shown(capsys, "inspect", one, "--against", other, "--json")[1])["overlap"]
    (overlap,) = [o for o in analysis.overlaps(analysis.updates(one), analysis.updates(other)) if o.path == s.path]
    assert told["layers"][s.path]["reads"] == [pytest.approx(row) for row in overlap.reads.tolist()]
    for picture in ("one.png", "two.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_inspect_of_what_needs_a_base_says_so_and_shows_the_rest(tiny, tmp_path, capsys):
    folder = loralab.attach(build("bert"), "vera", name="a", rank=7).save(tmp_path / "vera")
    code, out, err = shown(capsys, "inspect", folder)
    assert code == 0
    assert "rank 7" in out
    assert "give --model" in err
    code, out, err = shown(capsys, "inspect", folder, "--against", folder)
    assert (code, out) == (2, "")
    assert "give --model" in err


def test_a_stack_of_experts_is_a_matrix_of_blocks(tmp_path):
    """Its values are those of the blocks together; without a base, with one, and against another adapter."""
    model = zoo.build("mixtral")
    adapters = loralab.attach(model, "lora", name="a", rank=2, alpha=5.0, targets=["experts", "q_proj"])
    adapters.add("b", "lora", rank=3, alpha=5.0, targets=["experts", "q_proj"])
    shake(adapters, "a"), shake(adapters, "b", seed=3)
    folders = {name: adapters.save(tmp_path / name, name) for name in "ab"}
    path = next(p for p in adapters.spec("a").paths if p.endswith("gate_up_proj"))
    D = adapters.layers[path].lower("a").matrix().detach().double()  # (n, out, in)
    W = adapters.layers[path].base.dense().detach().double()
    s = torch.linalg.svdvals(torch.block_diag(*D))
    alone, over = updates(folders["a"]), updates(folders["a"], zoo.build("mixtral"))
    without, found = ({one.path: one for one in spectra(of)}[path] for of in (alone, over))
    n, top = len(D), 2
    assert len(found.values) == 2 * n
    for one in (without, found):
        assert one.values == pytest.approx(s[: 2 * n].tolist(), abs=1e-5)
        assert one.norm == pytest.approx(float(D.norm()), rel=1e-6)
        assert one.shape == D.shape[1:]
    U, _, Vh = torch.linalg.svd(D, full_matrices=False)
    along = float((U[..., :top].mT @ W @ Vh[:, :top].mT).norm())
    assert found.amplification == pytest.approx(float(D.norm()) / along, rel=1e-4)
    chance = float(sum((top * w.norm()) ** 2 / w.numel() for w in W)) ** 0.5
    assert found.along == pytest.approx(along / chance, rel=1e-4)
    assert without.amplification is None
    X, _, Yh = torch.linalg.svd(adapters.layers[path].lower("b").matrix().detach().double(), full_matrices=False)
    U, Vh, X, Yh = (t.numpy() for t in (U, Vh, X, Yh))
    shared = next(o for o in overlaps(alone, updates(folders["b"])) if o.path == path)
    assert shared.writes.shape == shared.reads.shape == (2, 3)
    for i, j in ((1, 1), (2, 3)):
        phi = [slow_phi(U[e], X[e], i, j) for e in range(n)]
        assert float(shared.writes[i - 1, j - 1]) == pytest.approx(sum(phi) / n, abs=1e-4)
        phi = [slow_phi(Vh[e].T, Yh[e].T, i, j) for e in range(n)]
        assert float(shared.reads[i - 1, j - 1]) == pytest.approx(sum(phi) / n, abs=1e-4)


@pytest.mark.parametrize("tie", [True, False])
def test_single_tokens_are_shown_too(tie, tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                    intermediate_size=24, tie_word_embeddings=tie)
    )  # fmt: skip
    adapters = loralab.attach(model, "lora", name="a", rank=2, tokens=[3, 7], targets="attention-qv")
    shake(adapters, "a", 4)
    adapters.save(tmp_path)
    found = updates(tmp_path)
    assert ("lm_head" in found) is tie
    token = found["model.embed_tokens"].update
    torch.testing.assert_close(token.matrix(), adapters.layers["model.embed_tokens"].lower("a").matrix())
    assert [s.path for s in spectra(found)] == list(found)


def test_a_weight_of_zeros_amplifies_nothing():
    """Its part along a direction is 0, and so is that of random ones: neither ratio is a number."""
    plain = Layer(update(3), torch.zeros(N_OUT, N_IN))
    (found,) = spectra({"q": plain})
    assert (found.amplification, found.along) == (None, None)
    (there,) = spectra({"q": Layer(update(3), random(N_OUT, N_IN, seed=8).float())})
    assert there.amplification > 0
    assert there.along > 0
