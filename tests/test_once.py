"""A list that names things names each once: what is given twice is refused, and nothing has changed."""

import pytest
import torch
from archs import build

import loralab
from loralab import UserError

ONCE = {  # argument of attach -> a list that is taken
    "targets": ["query", "value", "dense"],
    "head": ["classifier", "bert.pooler", "bert.embeddings.LayerNorm"],
    "labels": ["yes", "no", "perhaps"],
    "train": ["A", "B"],
}


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("key", ONCE)
def test_attach_refuses_what_is_given_twice(key, i):
    model, names = build("bert"), ONCE[key]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    i %= len(names)
    given = {"rank": 2, "head": True}
    for twice in ([*names, names[i]], [names[i], *names]):
        with pytest.raises(UserError, match="twice|once") as caught:
            loralab.attach(model, **given | {key: tuple(twice)})
        assert names[i] in str(caught.value)
        assert not [path for path, m in model.named_modules() if type(m).__module__.startswith("loralab")]
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    loralab.attach(model, **given | {key: tuple(names)})


def test_a_module_inside_another_of_the_head_is_refused():
    with pytest.raises(UserError, match=r"bert\.pooler\.dense is inside another"):
        loralab.attach(build("bert"), rank=2, head=["bert.pooler", "bert.pooler.dense"])


def test_use_and_synchronize_name_an_adapter_once():
    adapters = loralab.attach(build("bert"), rank=2, name="a", head=True)
    adapters.add("b", rank=3, head=True)
    with pytest.raises(UserError, match="use gives 'a' twice"), adapters.use(["a", "b", "a"], [0, 1, 2]):
        pass
    with pytest.raises(UserError, match="synchronize gives 'b' twice"):
        adapters.synchronize("b", "a", "b")
    with adapters.use(["b", "a"], [0, 1, 1]):
        adapters.synchronize("b", "a")
