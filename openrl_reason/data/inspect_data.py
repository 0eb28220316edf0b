"""``openrl-reason inspect-data``: what a run would train on, before it does: counts, lengths, and examples with the policy's tokens marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from openrl_reason.config import require
from openrl_reason.core.seeds import derive_seed
from openrl_reason.core.states import state_mask
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.data.offline import OfflineDataConfig, TokenStore, build_store
from openrl_reason.data.token_text import token_pieces

if TYPE_CHECKING:
    from rich.text import Text

_STEP_STYLES = ("bold green", "bold cyan")
_WIDTH = 150


@dataclass(frozen=True)
class InspectDataConfig:
    """Builds the token store of offline data, prints its statistics, and shows examples with the policy's tokens marked."""

    model: str = ""
    """Model folder (or hub name) whose tokenizer is used."""
    data: OfflineDataConfig = field(default_factory=OfflineDataConfig)
    """The data, with the same settings as in training."""
    output: str = "runs/inspect-data"
    """Folder of the token store, unless data.store names one. A run with the same settings and --data.store set to it uses it again."""
    num_examples: int = 4
    """Examples to show (pairs: of both sides)."""
    first: int = -1
    """Show the rows from this one on. -1: rows drawn by the seed."""
    seed: int = 0
    """Of the draw."""
    trust_remote_code: bool = False
    """Run the tokenizer's own Python code, if its folder brings some. Only for models whose code you trust."""

    def __post_init__(self) -> None:
        require(self.num_examples >= 0, "num_examples", self.num_examples, "use 0 for none, or a number")


def inspect_data(config: InspectDataConfig) -> TokenStore:
    """Builds or opens the store, prints table and examples, and returns the store."""
    from rich.console import Console

    from openrl_reason.models.loading import load_tokenizer

    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    store = build_store(config.data, config.model, config.output, trust_remote_code=config.trust_remote_code)
    console = Console(highlight=False) if Console().is_terminal else Console(width=_WIDTH, highlight=False, color_system=None)
    print_statistics(store.statistics, console)
    if config.num_examples:
        console.print(
            "\nThe policy's tokens are in brackets, one pair for each step, of which every token (or step, or response) has a state before it.\n"
            "What stands outside is read, and never learned. Special tokens are shown as they are, line feeds as \\n."
        )
    for row in _chosen_rows(store, config):
        trajectory = store.trajectory(row)
        console.print(f"\n{_heading(store, row, trajectory)}", markup=False, soft_wrap=True)
        console.print(marked_text(trajectory, tokenizer), soft_wrap=True)
    return store


def _chosen_rows(store: TokenStore, config: InspectDataConfig) -> Iterator[int]:
    sides = 2 if store.kind == "pairs" else 1
    units = len(store) // sides
    require(config.first < units, "first", config.first, f"the store has {units} rows: use a number below that")
    count = min(config.num_examples, units)
    if config.first >= 0:
        drawn = np.arange(config.first, min(config.first + count, units))
    else:
        drawn = np.sort(np.random.default_rng(derive_seed(config.seed, "inspect")).choice(units, count, replace=False))
    for unit in drawn:
        yield from range(int(unit) * sides, int(unit) * sides + sides)


def _heading(store: TokenStore, row: int, trajectory: Trajectory) -> str:
    states = ", ".join(f"{int(state_mask(trajectory, level).sum())} {level}" for level in ("token", "step", "response"))
    side = {"pairs": " chosen" if store.labels[row] else " rejected", "labels": f" label {bool(store.labels[row])}"}.get(store.kind, "")
    reward = f", reward {trajectory.reward:g}" if store.has_reward[row] else ", no reward"
    if store.kind == "steps":
        reward += f" of steps {np.round(trajectory.rewards, 4).tolist()}"
    return (
        f"row {row}{side} ({trajectory.info.get('source', 'no source')}): {trajectory.num_tokens} tokens,"
        f" {trajectory.num_prompt_tokens} of them prompt, {trajectory.num_steps} steps{reward}, ended: {trajectory.stop_reason}; states: {states}"
    )


def marked_text(trajectory: Trajectory, tokenizer: Any) -> Text:
    """The decoded sequence: brackets around each step's tokens, colours where there are any."""
    from rich.text import Text

    text = Text()
    pieces = _pieces(trajectory, tokenizer)
    open_step = -1
    for piece, step in zip(pieces, trajectory.step_ids.tolist(), strict=True):
        if step != open_step:
            text.append("⟧" if open_step >= 0 else "", "bold yellow")
            text.append("⟦" if step >= 0 else "", "bold yellow")
            open_step = step
        text.append(piece.replace("\n", "\\n\n"), _STEP_STYLES[step % 2] if step >= 0 else "dim")
    text.append("⟧" if open_step >= 0 else "", "bold yellow")
    return text


def _pieces(trajectory: Trajectory, tokenizer: Any) -> list[str]:
    """Text of each token; special tokens by their name. Parts of a character appear with its last token."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ids = trajectory.token_ids.tolist()
    plain = [token for token in ids if token not in special]
    text = tokenizer.decode(plain, skip_special_tokens=True)
    pieces = token_pieces(tokenizer, plain, text)
    if pieces is None:
        pieces = [tokenizer.decode([token]) for token in plain]
    rest = iter(pieces)
    return [tokenizer.convert_ids_to_tokens(token) if token in special else next(rest) for token in ids]


def print_statistics(statistics: Mapping[str, Any], console: Any = None) -> None:
    """The statistics of a store as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    counts, kind = statistics["counts"], statistics["kind"]
    table = Table(title=f"offline data: {kind}", title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    table.add_row("rows", f"{counts['rows']}, of which {counts['kept']} are kept")
    for name in ("empty", "identical", "prompt_too_long", "too_long", "truncated_left_out"):
        if counts.get(name):
            table.add_row("left out: " + name.replace("_", " "), str(counts[name]))
    for name, count in counts.items():
        if name.startswith("bad/"):
            table.add_row("left out: bad row, " + name.removeprefix("bad/").replace("_", " "), str(count))
    for name in ("truncated", "cut_off", "reward_unknown", "steps_not_told", "with_replies_read_only"):
        if counts.get(name):
            table.add_row(f"kept, and {name.replace('_', ' ')}", str(counts[name]))
    table.add_row("sequences, tokens", f"{statistics['sequences']}, {statistics['tokens']}")
    table.add_row("questions", str(statistics["questions"]))
    table.add_row("duplicates (equal to an earlier row)", str(statistics["duplicates"]))
    for name, shown in (("prompt_length", "prompt tokens"), ("response_length", "response tokens"), ("steps", "steps of a response")):
        spread = statistics[name]
        table.add_row(shown, f"mean {spread['mean']:.1f}, p50 {spread['p50']:.0f}, p95 {spread['p95']:.0f}, max {spread['max']:.0f}")
    if reward := statistics.get("reward"):
        table.add_row("reward", f"mean {reward['mean']:.4g}, std {reward['std']:.4g}, positive {reward['positive_rate']:.1%}")
        if values := reward.get("values"):
            table.add_row("rewards, how often", ", ".join(f"{value}: {count}" for value, count in values.items()))
    (console or Console(width=_WIDTH)).print(table)
