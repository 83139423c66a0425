"""The page of a race: one prompt, a column for each racer, the finish, and what the checkpoint's card says."""

import html
from collections.abc import Sequence

import gradio as gr

from .checkpoint_card import CheckpointCard, Figure
from .race import MAX_CHARACTERS, Progress, Race

MAX_WAITING = 16  # visitors; a race has the machine for itself
CSS = """
.finish { width: 100%; border-collapse: collapse; border: none; }
.finish td { border: none; padding: 0.3em 0.8em 0.3em 0; vertical-align: middle; }
.finish td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.finish td.bar { width: 55%; }
.finish td.bar div { height: 0.8em; min-width: 2px; border-radius: 0.4em; background: var(--color-accent); }
@media (max-width: 600px) { .finish td.bar { display: none; } }
"""
HOW = (
    "One after another, each with the machine for itself, live. Times run from the call to the token, the prompt's "
    "reading included."
)


def build_page(race: Race, name: str, card: CheckpointCard) -> gr.Blocks:
    r"""
    The page, ready to be launched.

    Args:
        race ([`~llm2slm.serving.race.Race`]): What it shows.
        name (`str`): What it calls the checkpoint.
        card ([`~llm2slm.serving.checkpoint_card.CheckpointCard`]): The prompts it offers, and the scores it shows.
    """
    with gr.Blocks(title=f"{name}: a race", analytics_enabled=False) as page:
        gr.Markdown(f"# {name}: a race\n\nA large language model reads your prompt **once**, a small one writes.")
        prompt = gr.Textbox(label="Prompt", lines=2, max_length=MAX_CHARACTERS, autofocus=True)
        with gr.Row():
            start = gr.Button("Race", variant="primary", scale=3)
            stop = gr.Button("Stop", scale=1)
        if card.prompts:
            gr.Examples([[text] for text in card.prompts], prompt, label="Prompts of the checkpoint's card")
        columns, times = [], []
        with gr.Row():
            for racer in race.racers:
                with gr.Column(min_width=280):
                    columns.append(gr.Textbox(label=racer.title, lines=5, max_lines=15, buttons=["copy"]))
                    times.append(gr.Markdown())
        finish = gr.HTML()
        gr.Markdown(f"<small>{HOW} {race.setting}</small>")
        if card.figures:
            gr.Markdown(describe_figures(card.figures))

        def run(text: str):
            yield dict.fromkeys((*columns, *times, finish), "")
            last: dict[int, Progress] = {}
            try:
                for index, last[index] in race.run(text):
                    yield {columns[index]: last[index].text, times[index]: describe(last[index])}
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from None
            yield {finish: describe_finish(race, list(last.values()))}

        running = gr.on(
            [start.click, prompt.submit],
            run,
            prompt,
            [*columns, *times, finish],
            show_progress="minimal",
            show_progress_on=finish,
            trigger_mode="once",
            concurrency_limit=1,
            api_name="race",
        )
        stop.click(lambda: "Stopped.", None, finish, cancels=[running], queue=False, api_visibility="private")
    return page.queue(max_size=MAX_WAITING)


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """
    Serves a page until Ctrl-C.

    Args:
        page (`gr.Blocks`): Of [`build_page`].
        host (`str`): The address to listen at.
        port (`int`): 0 for the first that is free from 7860 on.

    Raises:
        OSError: if it cannot listen there.
    """
    page.launch(
        server_name=host, server_port=port or None, css=CSS, ssr_mode=False, footer_links=["gradio", "settings"]
    )


# -------------------------------------------------------------------------------------------------------- what it says
def describe(progress: Progress) -> str:
    """The line below a response."""
    if progress.first_token_s is None:
        return ""
    said = f"first token after {in_seconds(progress.first_token_s)} · {progress.tokens} tokens"
    if progress.seconds is None:
        return said
    end = "cut" if progress.is_cut else "done"
    return f"**{end} after {in_seconds(progress.seconds)}** · {said} · **{speed_of(progress):.0f} tokens/s**"


def describe_finish(race: Race, finished: Sequence[Progress]) -> str:
    """Who came first, and how many times as fast as the LLM each one writes, token for token, as HTML."""
    reference, slowest = finished[race.reference], max(seconds_of(progress) for progress in finished)
    ranked = sorted(zip(race.racers, finished, strict=True), key=lambda one: seconds_of(one[1]))
    rows = []
    for racer, progress in ranked:
        seconds, times = seconds_of(progress), speed_of(progress) / speed_of(reference)
        said = "" if progress is reference else f"{times:.1f} times the speed"
        rows.append(
            f"<tr><td>{html.escape(racer.title)}</td>"
            f'<td class="bar"><div style="width: {100 * seconds / slowest:.1f}%"></div></td>'
            f'<td class="number">{in_seconds(seconds)}</td><td class="number">{said}</td></tr>'
        )
    first, than = html.escape(ranked[0][0].title), html.escape(race.racers[race.reference].title)
    return (
        f"<h3>First: {first}</h3><table class='finish'>{''.join(rows)}</table>"
        f"<small>Speed is compared with that of: {than}, token for token, since responses differ in length.</small>"
    )


def seconds_of(progress: Progress) -> float:
    """How long a whole response took; never 0, so that one can divide by it."""
    return max(progress.seconds or 0.0, 1e-6)


def speed_of(progress: Progress) -> float:
    """Tokens a second of a whole response, the prompt's reading included; never 0."""
    return max(progress.tokens, 1) / seconds_of(progress)


def describe_figures(figures: Sequence[Figure]) -> str:
    """A card's scores as a table, a row for each data set."""
    metrics = list(dict.fromkeys(figure.metric for figure in figures))
    lines = [f"| From the checkpoint's card | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for dataset in dict.fromkeys(figure.dataset for figure in figures):
        values = {figure.metric: figure.value for figure in figures if figure.dataset == dataset}
        lines.append(f"| {dataset} | {' | '.join(values.get(metric, '') for metric in metrics)} |")
    return "\n".join(lines)


def in_seconds(seconds: float) -> str:
    """Seconds as one reads them."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
