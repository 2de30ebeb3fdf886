"""View files: what is stored comes back over the same base, in any dtype, and nowhere else."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from orthrus_triton.models import OrthrusForCausalLM, demo, view
from orthrus_triton.models.view import load_view, merge_view, read_view_config, save_view
from orthrus_triton.modules import ConsensusDecoder
from tests.models.tiny_bases import base_config, build_base, randomise_view

K = 4


def make_model(case: str = "qwen3", seed: int = 0, **options) -> OrthrusForCausalLM:
    """A random base whose view moved a little, as training moves it."""
    base = build_base(base_config(case), seed=seed)
    return randomise_view(
        OrthrusForCausalLM.from_base(base, **{"block_size": K, "mask_token_id": 1, **options}), scale=0.1
    )


def fresh(model: OrthrusForCausalLM, dtype: torch.dtype = torch.float32) -> OrthrusForCausalLM:
    """The same base with an untrained view."""
    other = copy.deepcopy(model).to(dtype)
    other.reset_view()
    return other


def view_of(model: OrthrusForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "_diff" in name}


def worst_error(model: OrthrusForCausalLM, trained: OrthrusForCausalLM) -> float:
    """Largest error of a projection's delta, relative to its largest entry."""
    worst, base = 0.0, trained.state_dict()
    for name, tensor in view_of(model).items():
        if name.endswith("_proj_diff.weight"):
            wanted = base[name] - base[name.replace("_diff", "")]
            got = tensor - base[name.replace("_diff", "")]
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    return worst


@pytest.mark.parametrize(
    ("storage", "rank", "bound"),
    [("int8", None, 0.005), ("fp16", None, 0.001), ("bf16", None, 0.005), ("fp16", 64, 0.005), ("int8", 64, 0.05)],
)
def test_what_is_stored_comes_back(tmp_path, storage, rank, bound):
    trained = make_model("qwen3 biases, tied, window by layer types", mask_embedding=True)
    size = save_view(trained, tmp_path / "v.safetensors", storage=storage, rank=rank)
    assert size == (tmp_path / "v.safetensors").stat().st_size
    model = fresh(trained)
    assert worst_error(model, trained) > 0.9  # nothing came back yet
    load_view(model, tmp_path / "v.safetensors")
    assert worst_error(model, trained) < bound
    for name, tensor in trained.state_dict().items():
        if not name.endswith("_proj_diff.weight"):  # mask embedding, norms and biases, and all frozen weights
            assert torch.equal(model.state_dict()[name], tensor), name


def test_a_model_for_a_view_is_made_from_its_options(tmp_path):
    """As docs/training.md has it."""
    more = {"mask_embedding": True, "anchor_view": "ar", "chain_width": 8}
    trained = make_model(**more)
    save_view(trained, tmp_path / "v.safetensors")
    base = build_base(base_config("qwen3"))
    model = OrthrusForCausalLM.from_base(base, **read_view_config(tmp_path / "v.safetensors"))
    load_view(model, tmp_path / "v.safetensors")
    assert model.config.to_dict() == trained.config.to_dict() and worst_error(model, trained) < 0.005


def test_a_low_rank_delta_needs_no_more_than_its_rank(tmp_path):
    trained = make_model("qwen2", view_rank=3)
    save_view(trained, tmp_path / "v.safetensors", rank=3, storage="fp16")
    whole = OrthrusForCausalLM.from_base(build_base(base_config("qwen2")), block_size=K, mask_token_id=1)
    load_view(whole, tmp_path / "v.safetensors")
    ids = torch.randint(2, 100, (1, K))
    whole.requires_grad_(False), trained.requires_grad_(False)
    ours, theirs = (m(ids, view="diffusion").logits for m in (whole, trained))
    assert torch.allclose(ours, theirs, atol=5e-3 * theirs.abs().max().item())
    assert not torch.allclose(whole(ids).logits, theirs, atol=0.05 * theirs.abs().max().item())
    save_view(trained, tmp_path / "w.safetensors", rank=1, storage="fp16")
    load_view(whole, tmp_path / "w.safetensors")
    assert not torch.allclose(whole(ids, view="diffusion").logits, theirs, atol=5e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_is_known_in_every_dtype_and_drafts_come_with_it(tmp_path, dtype):
    trained = make_model()
    save_view(trained, tmp_path / "v.safetensors", storage="fp16")
    model = fresh(trained, dtype)
    load_view(model, tmp_path / "v.safetensors")
    ids = torch.randint(2, 100, (1, K))
    drafted = model(ids, view="diffusion").logits
    assert drafted.argmax(-1).eq(trained(ids, view="diffusion").logits.argmax(-1)).float().mean() >= 0.75
    assert not torch.equal(drafted, fresh(trained, dtype)(ids, view="diffusion").logits)
    with pytest.raises(ValueError, match="one of"):
        load_view(fresh(trained, torch.float64), tmp_path / "v.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_view_is_rounded_once(tmp_path, dtype):
    trained = make_model().to(dtype).float()
    for storage in ("int8", "fp16"):
        save_view(trained, tmp_path / "v.safetensors", storage=storage)
        model, rounded = fresh(trained), fresh(trained, dtype)
        load_view(model, tmp_path / "v.safetensors")
        load_view(rounded, tmp_path / "v.safetensors")
        for name, tensor in view_of(model).items():
            assert torch.equal(view_of(rounded)[name], tensor.to(dtype)), name


def test_a_view_over_a_rounded_base_goes_over_the_base_itself(tmp_path):
    base = make_model()
    over_bf16 = fresh(base, torch.bfloat16)  # as a GPU trains it
    for tensor in view_of(over_bf16).values():
        tensor.add_(0.01)
    save_view(over_bf16, tmp_path / "v.safetensors", storage="bf16")
    load_view(base, tmp_path / "v.safetensors")
    ids = torch.randint(2, 100, (1, K))
    expected, drafted = (model(ids, view="diffusion").logits for model in (over_bf16, base))
    assert torch.allclose(drafted, expected, atol=0.05 * expected.abs().max().item())
    with pytest.raises(ValueError, match="other base weights"):
        load_view(make_model(seed=1), tmp_path / "v.safetensors")


def test_another_base_is_refused(tmp_path):
    trained = make_model()
    save_view(trained, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="other base weights"):
        load_view(make_model(seed=1), tmp_path / "v.safetensors")
    tuned = fresh(trained)  # fine-tuned by a hair
    tuned.state_dict()["model.layers.1.mlp.down_proj.weight"][-8:].mul_(1.0001)  # of 64 rows
    before = {name: tensor.clone() for name, tensor in view_of(tuned).items()}
    with pytest.raises(ValueError, match="other base weights"):
        load_view(tuned, tmp_path / "v.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in view_of(tuned).items())


def test_a_base_is_known_by_what_earlier_files_say_of_it():
    """Another digest, and every view there is would be refused."""
    state = {"b.weight": torch.arange(9000.0).view(90, 100) / 8, "a.bias": torch.tensor([0.5, -2.0, 3.25])}
    state["a_diff"] = torch.ones(2)
    assert [view.fingerprint(state, dtype) for dtype in (torch.float32, torch.bfloat16)] == [
        "06a399ffe0797cd516f731ca254703f51dd65f9b8fdbeabe946b6335a8c87a00",
        "5c5c0ed55c715f98443b4277c28d006c640ef2bbcab1ea20ffd5f31ebfdee68f",
    ]


def test_options_must_fit(tmp_path):
    trained = make_model()
    path = tmp_path / "v.safetensors"
    save_view(trained, path)
    options = read_view_config(path)
    assert (options["block_size"], options["mask_token_id"], options["view_rank"]) == (K, 1, None)
    for wrong, complaint in (
        ({"block_size": K + 1}, "block_size"), ({"mask_token_id": 2}, "mask_token_id"), ({"view_rank": 2}, "view_rank"),
        ({"mask_embedding": True}, "mask_embedding"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=complaint):
            load_view(make_model(**wrong), path)
    load_view(make_model(block_size=K - 1), path)
    size = sum(tensor.nbytes for tensor in load_file(path).values())
    save_view(trained, path, max_bytes=size)
    with pytest.raises(ValueError, match="a view file must be at most"):
        save_view(trained, tmp_path / "w.safetensors", max_bytes=size - 1)
    with pytest.raises(ValueError, match="at most 0.01 MB.*rank=None.*int8"):
        save_view(trained, tmp_path / "w.safetensors", max_bytes=10_000)
    with pytest.raises(ValueError, match="storage"):
        save_view(trained, tmp_path / "w.safetensors", storage="int4")
    with pytest.raises(ValueError, match="rank"):
        save_view(trained, tmp_path / "w.safetensors", rank=0)
    for broken in (torch.nan, torch.inf):
        trained.state_dict()["model.layers.0.self_attn.k_proj_diff.weight"][0, 0] = broken
        with pytest.raises(ValueError, match="finite.*k_proj_diff"):
            save_view(trained, tmp_path / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "v.safetensors"
    save_view(make_model(), path)
    before = path.read_bytes()

    def no_room(staged, *_):
        staged.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(view, "write_safetensors", no_room)
    with pytest.raises(OSError, match="No space left"):
        save_view(make_model(), path, rank=2)
    assert [one.name for one in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_damaged_and_foreign_files(tmp_path):
    trained, path = make_model(), tmp_path / "v.safetensors"
    with pytest.raises(FileNotFoundError, match="v.safetensors"):
        load_view(trained, path)
    save_view(trained, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="complete safetensors"):
        load_view(trained, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must be a view file"):
        load_view(trained, path)
    path.write_bytes(whole)
    tensors = load_file(path)
    dropped = "model.layers.1.self_attn.o_proj_diff.weight"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: t for name, t in tensors.items() if not name.startswith(dropped)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="whole view.*layers.1.*o_proj_diff"):
        load_view(trained, path)


@pytest.mark.parametrize(
    "name", ["q_norm_diff.weight", "o_proj_diff.weight.int8", "o_proj_diff.weight.scale", "o_proj_diff.weight"]
)
@torch.no_grad()
def test_what_would_be_stretched_or_cut_short_leaves_the_view_as_it_was(tmp_path, name):
    trained, path = make_model(), tmp_path / "v.safetensors"
    save_view(trained, path, storage="fp16" if name == "o_proj_diff.weight" else "int8")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    shorter = {f"model.layers.1.self_attn.{name}": load_file(path)[f"model.layers.1.self_attn.{name}"][:1]}
    save_file(load_file(path) | shorter, path, metadata=metadata)
    other = fresh(trained)
    before = {key: tensor.clone() for key, tensor in view_of(other).items()}
    with pytest.raises(ValueError, match=f"must hold 'model.layers.1.self_attn.{name[:-7]}"):
        load_view(other, path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in view_of(other).items())
    save_file(load_file(path), path, metadata={"format": metadata["format"]})
    with pytest.raises(ValueError, match="must say 'base' in its metadata"):
        load_view(other, path)


@pytest.mark.parametrize(("extra", "missing"), [("chain_depth", None), (None, "block_size")])
def test_options_that_are_not_known_or_not_there_are_named(tmp_path, extra, missing):
    trained, path = make_model(), tmp_path / "v.safetensors"
    save_view(trained, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    options = {name: value for name, value in json.loads(metadata["config"]).items() if name != missing}
    options |= {extra: 2} if extra else {}
    save_file(load_file(path), path, metadata={**metadata, "config": json.dumps(options)})
    for load in (read_view_config, lambda path: load_view(trained, path)):
        with pytest.raises(ValueError, match=f"v.safetensors' must have the options .*, but '{extra or missing}'"):
            load(path)


def test_loading_is_deterministic(tmp_path):
    trained = make_model()
    save_view(trained, tmp_path / "a.safetensors", rank=8)
    save_view(trained, tmp_path / "b.safetensors", rank=8)
    stored, again = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
    base = trained.state_dict()
    one, two = (merge_view(tmp_path / "a.safetensors", base) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_demo_model_takes_shipped_file_and_copy(tmp_path, monkeypatch):
    trained = make_model("llama", mask_embedding=True)
    base_state = {name: tensor.clone() for name, tensor in trained.state_dict().items() if "_diff" not in name}
    monkeypatch.setattr(demo, "find_demo_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo, "load_gguf", lambda path: (base_config("llama"), dict(base_state), "tokenizer"))
    monkeypatch.setattr(demo, "SHIPPED_VIEW", tmp_path / "shipped.safetensors")
    with pytest.warns(UserWarning, match="no trained view"):
        model, tokenizer = demo.load_demo_model()
    copied = model.state_dict()
    assert tokenizer == "tokenizer" and model.block_size == 8
    assert all(torch.equal(tensor, copied[name.replace("_diff", "")]) for name, tensor in view_of(model).items())
    assert model.model.mask_embedding_diff is None
    assert demo.load_demo_model(view="copy", mask_embedding=True)[0].model.mask_embedding_diff is not None
    save_view(trained, demo.SHIPPED_VIEW, storage="fp16")
    model, _ = demo.load_demo_model()
    assert torch.equal(model.model.mask_embedding_diff, trained.model.mask_embedding_diff)
    assert (model.block_size, model.mask_token_id) == (K, 1) and worst_error(model, trained) < 0.001
    assert worst_error(demo.load_demo_model(view="copy", block_size=K)[0], trained) > 0.9
    assert demo.load_demo_model(view=demo.SHIPPED_VIEW, block_size=2)[0].block_size == 2
    with pytest.raises(ValueError, match="at most the view's 4"):
        demo.load_demo_model(block_size=5)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        demo.load_demo_model(view=tmp_path / "nothing.safetensors")
    bf16, _ = demo.load_demo_model(dtype=torch.bfloat16)
    for name, tensor in view_of(model).items():
        assert torch.equal(bf16.state_dict()[name], tensor.bfloat16())  # merged in fp32, then cast
    assert ConsensusDecoder(bf16).generate(torch.tensor([[5, 6]]), max_new_tokens=3).stats.tokens <= 3
