"""Context parallel on real processes and three meshes, against a plain PyTorch loop over whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fabric_backends.sequences import in_order, own_part
from fabric_core import Fabric
from fabric_core.errors import ConfigurationError, OptionsError

TOLERANCE = 2e-6  # float32, of parameters and losses around 1

TASK = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

STEPS, BATCH, WORDS, LENGTH = 8, 4, 11, 16

class Block(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal, self.norm = causal, nn.LayerNorm(16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        self.output, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, mask=None):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.query, self.key, self.value))
        h = scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=True)
        x = x + self.output(h.transpose(1, 2).flatten(-2))
        return x + self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    # tokens and positions (N, T) to scores (N, T, 11)
    def __init__(self, causal=True):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 16), nn.Embedding(LENGTH, 16)
        self.blocks = nn.ModuleList(Block(causal) for _ in range(2))
        self.head = nn.Linear(16, WORDS)

    def forward(self, tokens, positions, mask=None):
        x = self.words(tokens) + self.places(positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)

def seeded(seed, causal):
    torch.manual_seed(seed)
    return Net(causal)

def data(batches):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(WORDS, (batches * BATCH, LENGTH + 1), generator=generator)

POSITIONS = torch.arange(LENGTH)
MASK = (POSITIONS[:, None] - POSITIONS).abs() < 6  # every place sees its surroundings

def loss_of(model, inputs, targets, positions, mask=None):
    return cross_entropy(model(inputs, positions, mask).flatten(0, 1), targets.flatten())
"""

TRAINING = (
    TASK
    + """
import json
from torch.utils.data import DataLoader
from fabric_core import Fabric

shape = json.loads(os.environ["SHAPE"])

def opened(**options):
    sizes = {"data_parallel_size": shape[0], "context_parallel_size": shape[1]}
    return Fabric(accelerator=os.environ["ACCELERATOR"], devices=shape[0] * shape[1], strategy="context_parallel",
                  strategy_options={**sizes, **options})

def train(causal=True, every=1, norm=None, **options):
    with opened(**options) as fabric:
        fabric.launch()
        model = seeded(3 + fabric.global_rank, causal)  # only rank 0 has the weights of the plain loop
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        tokens, losses, norms = data(STEPS * every - (every > 1)), [], []
        positions, mask = fabric.to_device((POSITIONS, MASK))
        torch.rand(rank)
        for batch in fabric.setup_dataloaders(DataLoader(tokens, batch_size=BATCH // shape[0])):
            whole = (batch[:, :-1], batch[:, 1:], positions, *(() if causal else (mask,)))
            with (
                fabric.accumulate(model, every=every),
                fabric.strategy.shard_sequence(*whole, dim=(1, 1, 0, -2)[: len(whole)]) as parts,
            ):
                loss = loss_of(model, *parts)
                fabric.backward(loss)
                if norm is not None:
                    norms.append(fabric.clip_gradients(model, optimizer, max_norm=norm))
                optimizer.step()
                optimizer.zero_grad()
            losses.append(fabric.all_reduce(loss.detach()).item())
        batch = fabric.to_device(tokens[:2, :-1])
        with torch.no_grad():
            alone = model(batch, positions, None if causal else mask)  # outside of a block, all is as usual
            with fabric.strategy.shard_sequence(batch, positions, mask, dim=(1, 0, -2)) as (own, places, rows):
                together = fabric.strategy.gather_sequence(model(own, places, None if causal else rows))
        return {"losses": losses, "norms": [float(one) for one in norms if one is not None],
                "parameters": {name: p.full_tensor().detach().cpu() for name, p in model.state_dict().items()},
                "evaluated": (together - alone).abs().max().item()}

def check_rules():
    with opened() as fabric:
        fabric.launch()
        fabric.barrier()
        strategy, length = fabric.strategy, 4 * shape[1]
        x = fabric.to_device(torch.randn(2, length, 8))
        found = {"mesh": (strategy.mesh.mesh_dim_names, tuple(strategy.mesh.shape), strategy.mesh.get_coordinate()),
                 "share": strategy.sampler_arguments}
        def inside(function, *tensors, **options):
            with strategy.shard_sequence(*tensors, **options) as part:
                return error_of(function, part)
        found["length"] = error_of(lambda: inside(len, x[:, 1:]))
        found["dims"] = error_of(lambda: inside(len, x, x, dim=(1,)))
        found["no such dim"] = error_of(lambda: inside(len, x, dim=3))
        found["nested"] = inside(lambda part: inside(len, x), x)
        attention = fabric.to_device(nn.MultiheadAttention(8, 2, batch_first=True))
        found["module"] = inside(lambda part: attention(part, part, part, need_weights=False), x)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device)
        found["mask"] = inside(lambda part: scaled_dot_product_attention(part, part, part, mask), x)
        found["afterwards"] = error_of(attention, x, x, x)
        rows = DataLoader(torch.zeros(8, 1) + fabric.global_rank, batch_size=2)
        found["different"] = error_of(lambda: next(iter(fabric.setup_dataloaders(rows))))
        return found

before = threads()
answer({
    "causal": train(),
    "computed again": train(activation_checkpointing={Block}),
    "with a mask": train(causal=False),
    "everything": train(every=3, norm=0.5, activation_checkpointing={Block}),
    "rules": check_rules(),
    "threads": threads() - before - (rank == 0),  # rank 0 serves the store
})
"""
)

PLAIN: dict[str, dict[str, Any]] = {
    "causal": {},
    "computed again": {},
    "with a mask": {"causal": False},
    "everything": {"every": 3, "norm": 0.5},
}
MESHES = {
    "1x2": ("cpu", 1, 2),
    "2x1": ("cpu", 2, 1),
    "2x2": ("cpu", 2, 2),
    "1x4": ("cpu", 1, 4),
    "1x2 on GPUs": ("cuda", 1, 2),
}
TWO_GPUS = (
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not run: needs two GPUs"),
)


def plain_loop(
    causal: bool = True, every: int = 1, norm: float | None = None
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """One process, whole batches of whole sequences: losses, norms and parameters."""
    scope: dict[str, Any] = {}
    exec(TASK, scope)
    model = scope["seeded"](3, causal)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = scope["data"](scope["STEPS"] * every - (every > 1)).split(scope["BATCH"])
    losses, norms = [], []
    for begin in range(0, len(batches), every):
        window = batches[begin : begin + every]
        for batch in window:
            mask = None if causal else scope["MASK"]
            loss = scope["loss_of"](model, batch[:, :-1], batch[:, 1:], scope["POSITIONS"], mask)
            (loss / len(window)).backward()
            losses.append(loss.item())
        if norm is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), norm)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=TWO_GPUS if "GPU" in name else ()) for name in MESHES],
)
def found(request: pytest.FixtureRequest, shared_programs: Any) -> tuple[tuple[int, int], list[Any]]:
    """A mesh (data, context), and what each of its ranks found."""
    accelerator, data, context = MESHES[request.param]
    setting = {"SHAPE": f"[{data}, {context}]", "ACCELERATOR": accelerator}
    answers = shared_programs.answers_of(TRAINING, data * context, timeout=110, **setting)
    return (data, context), answers


@pytest.fixture
def tolerance(request: pytest.FixtureRequest) -> float:
    """How far float32 may be from the plain loop, which is on the CPU."""
    return 1e-4 if "GPU" in request.node.callspec.params["found"] else TOLERANCE


@pytest.mark.parametrize("how", PLAIN)
def test_divided_sequences_train_as_whole_ones_do(
    found: tuple[tuple[int, int], list[Any]], how: str, tolerance: float
) -> None:
    with torch.random.fork_rng():
        losses, norms, parameters = plain_loop(**PLAIN[how])
    for trained in (answer[how] for answer in found[1]):
        assert trained["losses"] == pytest.approx(losses, abs=tolerance)
        assert trained["norms"] == pytest.approx(norms, abs=tolerance)
        assert trained["parameters"].keys() == parameters.keys()
        for name, value in parameters.items():
            assert (trained["parameters"][name] - value).abs().max() <= tolerance, name


@pytest.mark.parametrize("how", ["causal", "with a mask"])
def test_what_is_gathered_is_what_one_rank_computes(
    found: tuple[tuple[int, int], list[Any]], how: str, tolerance: float
) -> None:
    assert all(answer[how]["evaluated"] <= tolerance for answer in found[1])


def test_the_mesh_has_two_named_axes_and_data_is_split_along_one(
    found: tuple[tuple[int, int], list[Any]],
) -> None:
    (data, context), answers = found
    for rank, rules in enumerate(answer["rules"] for answer in answers):
        place = (rank // context, rank % context)
        assert rules["mesh"] == (("data_parallel", "context_parallel"), (data, context), place)
        assert rules["share"] == {"num_replicas": data, "rank": place[0]}


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("length", "ConfigurationError", "its length has to be a multiple of"),
        ("dims", "ConfigurationError", "got 2 tensors and 1 dims"),
        ("no such dim", "ConfigurationError", "has no dimension 3"),
        ("nested", "SetupError", "inside of a block of its own"),
        ("module", "UnsupportedError", "nn.MultiheadAttention cannot attend"),
        ("mask", "ConfigurationError", "a row for each query of this rank"),
        ("different", "SetupError", "their first batches differ"),
    ],
)
def test_what_would_compute_wrongly_is_refused(
    found: tuple[tuple[int, int], list[Any]], case: str, error: str, words: str
) -> None:
    (_, context), answers = found
    for rules in (answer["rules"] for answer in answers):
        if context == 1 and case != "dims":
            continue  # nothing is divided
        name, message = rules[case]
        assert name == error
        assert words in message


def test_after_a_block_everything_is_as_before(found: tuple[tuple[int, int], list[Any]]) -> None:
    assert all(answer["rules"]["afterwards"] is None for answer in found[1])


def test_closing_leaves_no_thread_of_a_group(found: tuple[tuple[int, int], list[Any]]) -> None:
    assert all(answer["threads"] <= 0 for answer in found[1])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_parts_make_the_whole_again_and_are_equally_far_back(ranks: int) -> None:
    sequence = torch.randn(2, 12 * ranks, 3)
    parts = [own_part(sequence, 1, rank, ranks) for rank in range(ranks)]
    assert torch.equal(in_order(torch.stack(parts), 1), sequence)
    positions = torch.arange(12 * ranks)
    seen = [int((own_part(positions, 0, rank, ranks) + 1).sum()) for rank in range(ranks)]
    assert len(set(seen)) == 1


@pytest.mark.parametrize("length", [5, 6])
def test_a_sequence_that_cannot_be_divided_is_refused(length: int) -> None:
    with pytest.raises(ConfigurationError, match="a multiple of 4. Pad it"):
        own_part(torch.zeros(2, length), 1, 0, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_parallel_size": 4}, r"data_parallel\(1\) \* context_parallel\(4\) != WORLD_SIZE\(6\)"),
        ({"context_parallel": 2}, "Did you mean 'context_parallel_size'"),
        ({"checkpoint": "ful"}, "Did you mean 'full'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_starts(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionsError, match=words):
        Fabric(accelerator="cpu", devices=6, strategy="context_parallel", strategy_options=options)
