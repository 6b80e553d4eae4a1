"""The state of every stage of a run: fresh, or stale with the reasons."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coremill.core.command import command_parser, exit_on_error
from coremill.core.config import RunConfig
from coremill.core.layout import RunLayout
from coremill.core.machine import whole_megabytes
from coremill.pipeline.environments import LANES, PRIMARY_LANE, installed
from coremill.pipeline.freshness import Freshness, freshness
from coremill.pipeline.project import add_run_options, chosen_run, project_root
from coremill.pipeline.stages import stages_of, switched_off


def run_status(root: Path, config: RunConfig, layout: RunLayout, lanes: Sequence[str]) -> list[Freshness]:
    """Return one state per stage, or per stage and lane, in the order in which they run.

    An unchanged stage that needs a stale one is stale: running that one may change its inputs.
    """
    toolsets, stages = installed(root), stages_of(config)
    states: dict[tuple[str, str | None], Freshness] = {}
    for lane in lanes:
        for stage in stages:
            own_lane = lane if stage.per_lane else None
            key = (stage.name, own_lane)
            if key in states:
                continue
            toolset = toolsets.get(stage.environment(own_lane).name)
            state = freshness(stage, config, layout, toolset, own_lane, stages)
            stale = [need for need in stage.needs if not (states.get((need, own_lane)) or states[need, None]).fresh]
            reasons = (*state.reasons, *(f"needs {need}, which is stale" for need in stale))
            states[key] = msgspec.structs.replace(state, reasons=reasons)
    return list(states.values())


def status_table(run: str, states: Sequence[Freshness], off: Sequence[str] = ()) -> Table:
    """Args: off: the stages that the configuration switches off."""
    table = Table(title=f"build/{run}", title_justify="left", title_style="bold")
    for column in ("stage", "lane", "state", "peak memory", "why"):
        table.add_column(column, overflow="fold")
    for state in states:
        word = "[green]fresh[/]" if state.fresh else "[yellow]stale[/]"
        peak = "" if state.peak_anonymous_bytes is None else whole_megabytes(state.peak_anonymous_bytes)
        table.add_row(state.stage, state.lane or "", word, peak, Text("\n".join(state.reasons)))
    for name in off:
        table.add_row(name, "", "[dim]switched off[/]", "", "`formats` in the configuration does not name it")
    return table


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("status", __doc__, example="--config configs/smollm2-135m.toml --torch all")
    parser.add_argument(
        "--torch", choices=(*LANES, "all"), default=PRIMARY_LANE, help="the lane (default: %(default)s)"
    )
    add_run_options(parser)
    options = parser.parse_args(argv)
    config, layout = chosen_run(options)
    lanes = LANES if options.torch == "all" else (options.torch,)
    states = run_status(project_root(), config, layout, lanes)
    Console().print(status_table(config.name, states, switched_off(config)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
