"""Adapters of the two published packages: written by the real ones and read by Umbra, written by Umbra and read by them.

Compared are logits, attached and detached. Nothing is mapped here: what the packages compute is the reference.
"""

import copy
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import shadow_peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import umbra
from support import peers
from support.tiny import make, make_base, tokens
from umbra.cli import main
from umbra.deploy.convert import convert

TOLERANCE = 1e-5
SECTION = "Adapters of others"
# PEFT itself still reads the first name, and warns of what it cannot do with tied heads
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
CLASSES = {"num_labels": 3}
FOUR = ("llama", "qwen3", "gpt2", "gemma3_text")


@dataclass(frozen=True)
class Case:
    """An adapter of a package: ``shadow`` is the name of an explicit one, see `shadows`."""

    package: str
    base: str = "llama"
    classifier: bool = False
    options: dict = field(default_factory=dict)  # of the base
    fields: dict = field(default_factory=dict)  # of the package's ShadowConfig
    shadow: str | None = None

    def make_base(self):
        options = {**(CLASSES if self.classifier else {}), **self.options}
        return make_base(self.base, classifier=self.classifier, **options)


def peft_case(base: str = "llama", **fields) -> Case:
    return Case("peft", base, fields={"r": 4, "shadow_alpha": 0.5, **fields})


def package_case(base: str = "llama", **fields) -> Case:
    return Case("shadow-peft", base, fields={"injection_hidden_size": 5, "alpha": 0.5, **fields})


def but(case: Case, **changes) -> Case:
    return Case(**{**case.__dict__, **changes})


TIED = {"tie_word_embeddings": True}
CASES = {
    **{f"peft mirror {name}": peft_case(name, shadow_num_hidden_layers=2) for name in (*FOUR, "gpt_neox", "qwen3_moe")},
    **{f"peft classifier {name}": but(peft_case(name), classifier=True) for name in FOUR},
    "peft scaled by depth": but(peft_case("gpt2"), options={"scale_attn_by_inverse_layer_idx": True}),
    "peft of two blocks": but(peft_case(), options={"num_hidden_layers": 2}),
    "peft smaller": peft_case(shadow_hidden_size=16, shadow_intermediate_size=20, shadow_num_attention_heads=2),
    "peft narrow gemma3_text": peft_case("gemma3_text", shadow_hidden_size=16),
    "peft own embeddings": peft_case("gpt2", share_embeddings=False, update_hidden_size=7),
    "peft trained head": peft_case(modules_to_save=["lm_head"]),
    "peft trained tied head": but(peft_case(modules_to_save=["lm_head"]), options=TIED),
    "peft no task": peft_case(task_type=None),
    "peft middle blocks": peft_case(target_modules=["model.layers.1", "model.layers.2"]),
    "peft one block": peft_case(target_modules=["model.layers.1"]),
    "peft last blocks by pattern": peft_case(target_modules=r".*\.layers\.[23]"),
    "peft but the first block": peft_case(exclude_modules=["layers.0"]),
    "peft layers_to_transform": peft_case(layers_to_transform=[1, 2], layers_pattern="layers"),
    **{f"peft explicit {name}": but(peft_case(), shadow=name) for name in ("narrow", "equal", "other", "projected")},
    **{f"shadow-peft implicit {name}": package_case(name, num_shadow_layers=2) for name in (*FOUR, "gpt_neox")},
    **{f"shadow-peft classifier {name}": but(package_case(name), classifier=True) for name in FOUR},
    "shadow-peft of two blocks": but(package_case(), options={"num_hidden_layers": 2}),
    "shadow-peft smaller": package_case(
        shadow_intermediate_size=20, shadow_num_attention_heads=2, shadow_num_key_value_heads=1, shadow_head_dim=6
    ),
    "shadow-peft MoE": package_case("qwen3_moe"),
    "shadow-peft trained heads": package_case(modules_to_save=["lm_head", "shadow_lm_head"]),
    "shadow-peft one trained head": package_case(modules_to_save=["shadow_lm_head"]),
    "shadow-peft one classifier head": but(package_case(modules_to_save=["classifier_head"]), classifier=True),
    **{
        f"shadow-peft explicit {name}": but(package_case(), shadow=name)
        for name in ("narrow", "equal", "other", "projected")
    },
}  # fmt: skip
# PEFT has no head for a shadow without a task, and its detached form no experts.
NOT_DETACHED = ("peft no task", "peft mirror qwen3_moe")


@pytest.fixture(scope="session")
def shadows(tmp_path_factory) -> Path:
    """Pretrained shadows: narrower, as wide as the base, of another architecture, and one with a projection."""
    root = tmp_path_factory.mktemp("shadows")
    narrow = make_base(seed=5, hidden_size=16, num_hidden_layers=2)
    narrow.save_pretrained(root / "narrow")
    make_base(seed=6, num_hidden_layers=2).save_pretrained(root / "equal")
    make_base("gpt2", seed=7, n_embd=16, n_layer=2).save_pretrained(root / "other")
    torch.manual_seed(8)
    shadow_peft.AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=narrow, shadow_hidden_projection=torch.nn.Linear(16, 32, bias=False),
        lm_head=make_base().lm_head, init_optimal_projection=False,
    ).save_pretrained(root / "projected")  # fmt: skip
    return root


class Package:
    """One of the two packages, at work on a case."""

    def __init__(self, case: Case, shadows: Path):
        self.case, self.path = case, str(shadows / case.shadow) if case.shadow else None

    def _explicit(self):
        if self.path is None:
            return None
        projected = shadow_peft.AutoModelForCausalLMWithHiddenProjection
        return (projected if self.case.shadow == "projected" else AutoModel).from_pretrained(self.path)

    def build(self):
        """The package's model, its weights scrambled."""
        torch.manual_seed(0)
        base, fields = self.case.make_base(), self.case.fields
        if self.case.package == "peft":
            fields = {**fields, "shadow_model": self.path} if self.path else fields
            return peers.scramble_trained(peers.peft_model(base, self.case.classifier, **fields))
        model = peers.shadow_peft_model(base, self.case.classifier, shadow=self._explicit(), **fields)
        return peers.scramble_trained(model)

    def load(self, folder: Path):
        """What the package makes of a folder."""
        if self.case.package == "peft":
            return peers.load_peft(self.case.make_base(), folder)
        return peers.load_shadow_peft(self.case.make_base(), folder, self.case.classifier, self._explicit())

    def umbra(self, folder: Path, **options) -> umbra.ShadowModel:
        """What Umbra makes of it."""
        told = {"shadow": self.path} if self.path and self.case.package == "shadow-peft" else {}
        return umbra.load(folder, base=self.case.make_base(), **told, **options)


@dataclass
class Written:
    """What a package wrote, and what it computes."""

    package: Package
    folder: Path
    attached: torch.Tensor
    shadow: torch.Tensor


@pytest.fixture(scope="session")
def written(tmp_path_factory, shadows):
    """Case name → `Written`; each is written once."""

    @cache
    def write(name: str) -> Written:
        package, folder = Package(CASES[name], shadows), tmp_path_factory.mktemp("theirs") / "adapter"
        model = package.build()
        model.save_pretrained(folder)
        with torch.no_grad():
            attached, bare = model(input_ids=tokens()).logits, CASES[name].make_base()(tokens()).logits
            assert (attached - bare).abs().max() > 0.05, "a no-op proves nothing"
            shadow = None if name in NOT_DETACHED else peers.shadow_logits(model, tokens())
        return Written(package, folder, attached, shadow)

    return write


def difference(model, logits: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(input_ids=tokens()).logits - logits).abs().max())


def kind_of(name: str, case: Case) -> str:
    if case.classifier:
        return "classifiers"
    for word, kind in (("explicit", "pretrained shadows"), ("head", "trained heads"), ("block", "chosen blocks")):
        if word in name:
            return kind
    return "mirrored shadows"


def of(package: str) -> list:
    """The cases of a package, each with what it proves for the compatibility page."""
    title = {"peft": "PEFT's ShadowConfig", "shadow-peft": "shadow-peft"}[package]
    return [
        pytest.param(name, marks=pytest.mark.compat(SECTION, f"{title}: {kind_of(name, case)}", "read, written"))
        for name, case in CASES.items()
        if case.package == package
    ]


EVERY = pytest.mark.parametrize("name", [*of("peft"), *of("shadow-peft")])


@EVERY
def test_logits_equal_peer_package(written, name):
    """Attached, and of the shadow alone as a stock model; then once more from Umbra's own folder."""
    theirs = written(name)
    model = theirs.package.umbra(theirs.folder)
    assert difference(model, theirs.attached) <= TOLERANCE
    assert not any(p.requires_grad for p in model.parameters())
    if theirs.shadow is not None:
        assert difference(model.detached(), theirs.shadow) <= TOLERANCE
    own = theirs.folder.parent / "umbra"
    model.save_pretrained(own)
    again = umbra.load(own, base=theirs.package.case.make_base())
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.shadow_config == model.shadow_config


@EVERY
def test_peer_checkpoint_round_trips(written, name, tmp_path):
    """The package loads what Umbra wrote: the same logits, and each tensor that feeds something bit for bit."""
    theirs = written(name)
    convert(theirs.package.umbra(theirs.folder), tmp_path / "back", theirs.package.case.package)
    again = theirs.package.load(tmp_path / "back")
    assert difference(again, theirs.attached) <= TOLERANCE
    if theirs.shadow is not None:
        with torch.no_grad():
            assert (peers.shadow_logits(again, tokens()) - theirs.shadow).abs().max() <= TOLERANCE
    for file in theirs.folder.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "back" / file.name)
        assert before.keys() <= after.keys()
        changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
        tables = {k for k in changed if k.endswith(("wte.weight", "embed_in.weight"))}
        assert all(torch.equal(after[k], theirs.package.case.make_base().get_input_embeddings().weight) for k in tables)
        dead = {k for k in changed - tables if "update" in k and "hidden_norm" not in k}
        assert not any(after[k].any() for k in dead)
        assert len(dead) <= (8 if theirs.package.case.package == "peft" else 4), "one update feeds nothing"
        assert all("hidden_norm" in k and name.endswith("of two blocks") for k in changed - tables - dead)


# -- made by Umbra -----------------------------------------------------------------------------------------------------

MADE = {
    **{f"{name} {to}": (name, to, {}) for name in FOUR for to in ("peft", "shadow-peft")},
    "two layers": ("llama", "peft", {"shadow_num_hidden_layers": 2, "gate_rank": 7, "auxiliary_loss_weight": 0.3}),
    "own embeddings": ("llama", "peft", {"embeddings": "own", "shadow_hidden_size": 16}),
    "middle blocks": ("llama", "peft", {"layers": (1, 2)}),
    "from the second block on": ("gpt2", "peft", {"first_layer": 1}),
    "equal heads": ("llama", "peft", {"train_heads": True}),
    "pretrained": ("llama", "peft", {"shadow": "narrow"}),
    "projected": ("llama", "peft", {"shadow": "projected"}),
    "small": ("llama", "shadow-peft", {"shadow_num_key_value_heads": 1, "shadow_head_dim": 6, "gate_rank": 2}),
    "two heads": ("llama", "shadow-peft", {"train_heads": True}),
    "paper in the other dialect's name": (
        "llama", "shadow-peft",
        {"dialect": "peft", "first_layer": 1, "constants": {"norm": True, "activation": "silu", "bias": False}},
    ),
    "pretrained beside shadow-peft": ("llama", "shadow-peft", {"shadow": "projected"}),
}  # fmt: skip


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("name", MADE)
@pytest.mark.compat(SECTION, "umbra convert: adapters made by Umbra, loaded by the packages", "peft and shadow-peft")
def test_peer_package_loads_umbra_adapter(name, classifier, shadows, tmp_path):
    base, to, fields = MADE[name]
    chosen = fields.get("shadow")
    fields = {"dialect": "peft" if to == "peft" else "paper", "rank": 4, "alpha": 0.5, "dropout": 0.0, **fields}
    if chosen:
        fields["shadow"] = str(shadows / chosen)
    model = make(base, classifier=classifier, base_options=CLASSES if classifier else None, **fields)
    if to == "peft" and model.shadow.heads and not classifier:
        model.shadow.heads["shadow"].load_state_dict(model.shadow.heads["attached"].state_dict())
    convert(model, tmp_path / "out", to)
    case = Case(to, base, classifier, shadow=chosen)
    theirs = Package(case, shadows).load(tmp_path / "out")
    with torch.no_grad():
        assert difference(theirs, model(tokens()).logits) <= TOLERANCE
        detached = model.detached()(tokens()).logits
        assert (peers.shadow_logits(theirs, tokens()) - detached).abs().max() <= TOLERANCE
    told = {"shadow": fields["shadow"]} if chosen and to == "shadow-peft" else {}
    again = umbra.load(tmp_path / "out", base=case.make_base(), **told)
    assert difference(again, model(tokens()).logits) <= TOLERANCE
    assert again.shadow_config.auxiliary_loss_weight == model.shadow_config.auxiliary_loss_weight


# -- in use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CASES if n.endswith(FOUR) and "classifier" not in n and "narrow" not in n])
@pytest.mark.compat(SECTION, "cached generation: the packages' own tokens")
def test_cached_generation_equals_peer_package(written, name):
    """Greedy tokens with one cache here and two there, over a prompt longer than Gemma's window."""
    theirs = written(name)
    mine, peer = theirs.package.umbra(theirs.folder), theirs.package.load(theirs.folder)
    asked = {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    asked |= {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    found = mine.generate(**asked)
    assert torch.equal(found, peer.generate(**asked))
    bare = theirs.package.case.make_base().generate(**asked)
    assert not torch.equal(found, bare)


def test_imported_adapter_trains(written):
    theirs = written("peft explicit narrow")
    model = theirs.package.umbra(theirs.folder, trainable=True).train()
    model(tokens(), labels=tokens()).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "shadow.backbone.layers.0.mlp.up_proj.weight" in trained
    assert "shadow.backbone.embed_tokens.weight" not in trained


@pytest.mark.compat(SECTION, "theirs and Umbra's beside one base, in one batch")
def test_several_imported_adapters_share_one_base(written):
    """Theirs and ours in one batch."""
    peft, package = written("peft mirror llama"), written("shadow-peft smaller")
    model = make()
    ours = model(tokens()).logits
    model.load_adapter(peft.folder, "peft")
    model.load_adapter(package.folder, "package")
    with torch.no_grad():
        found = model(tokens().repeat(3, 1), adapter_names=["peft"] * 2 + ["package"] * 2 + ["default"] * 2).logits
    wanted = torch.cat([peft.attached, package.attached, ours])
    assert (found - wanted).abs().max() <= TOLERANCE


def test_explicit_shadow_coexists_with_another_adapter(written):
    """shadow-peft's folders do not hold the shadow, which has to be named here too."""
    package = written("shadow-peft explicit narrow")
    model = make()
    with pytest.raises(umbra.CheckpointError, match="shadow="):
        model.load_adapter(package.folder, "package")
    model.load_adapter(package.folder, "package", shadow=package.package.path)
    model.set_adapter("package")
    with torch.no_grad():
        assert (model(tokens()).logits - package.attached).abs().max() <= TOLERANCE


@pytest.mark.parametrize("classifier", [False, True])
def test_imported_adapter_loads_base_by_name(classifier, tmp_path):
    """PEFT notes it; how many labels a classifier has is told by its head."""
    make_base(classifier=classifier, **(CLASSES if classifier else {})).save_pretrained(tmp_path / "base")
    kind = type(make_base(classifier=classifier))
    peer = peers.peft_model(kind.from_pretrained(tmp_path / "base", **(CLASSES if classifier else {})), classifier, r=4)
    peers.scramble_trained(peer).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("id2label", "label2id", "num_labels")})
    )
    model = umbra.load(tmp_path / "adapter")
    with torch.no_grad():
        assert difference(model, peer(input_ids=tokens()).logits) <= TOLERANCE


@pytest.mark.compat(SECTION, "causal_lm_with_hidden_projection checkpoints as shadows to attach")
def test_projected_checkpoint_attaches_as_shadow(shadows):
    """Its backbone and its trained projection, and nothing random between them."""
    base = make_base()
    model = umbra.attach(base, umbra.ShadowConfig(shadow=str(shadows / "projected")))
    weights = load_file(shadows / "projected" / "model.safetensors")
    assert torch.equal(model.shadow.projection.weight, weights["shadow_hidden_projection.weight"])
    for key, value in model.shadow.backbone.state_dict().items():
        assert torch.equal(value, weights[f"shadow_model.{key}"])
    stock = copy.deepcopy(model).detached()
    whole = shadow_peft.AutoModelForCausalLMWithHiddenProjection.from_pretrained(shadows / "projected")
    with torch.no_grad():
        wanted = base.lm_head(whole.shadow_hidden_projection(whole.shadow_model(tokens()).last_hidden_state))
    assert difference(stock, wanted) <= TOLERANCE


@pytest.mark.parametrize("package", ["peft", "shadow-peft"])
def test_half_precision_checkpoint_is_read(written, package, tmp_path):
    """As the package reads it: into float32."""
    theirs = written("peft mirror llama" if package == "peft" else "shadow-peft implicit llama")
    for file in theirs.folder.iterdir():
        if file.suffix == ".safetensors":
            save_file({k: v.bfloat16() for k, v in load_file(file).items()}, tmp_path / file.name)
        else:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    peer = theirs.package.load(tmp_path)
    with torch.no_grad():
        assert difference(theirs.package.umbra(tmp_path), peer(input_ids=tokens()).logits) <= TOLERANCE


def test_convert_command_round_trips_checkpoint(written, tmp_path, capsys):
    """There and back again, by name of the base."""
    make_base().save_pretrained(tmp_path / "base")
    theirs = written("shadow-peft implicit llama")
    arguments = ["--base", str(tmp_path / "base"), "--to"]
    for source, to, out in ((theirs.folder, "umbra", "a"), (tmp_path / "a", "shadow-peft", "b")):
        assert main(["convert", str(source), *arguments, to, "--out", str(tmp_path / out)]) == 0
    assert "shadow_adapter.safetensors" in capsys.readouterr().out
    assert difference(theirs.package.load(tmp_path / "b"), theirs.attached) <= TOLERANCE
    assert main(["convert", str(tmp_path / "b"), "--to", "umbra", "--out", str(tmp_path / "c"), "--json"]) == 0
    assert "adapter_config.json" in json.loads(capsys.readouterr().out)["files"]
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("base")
