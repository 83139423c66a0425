"""The page of a race: one prompt, a column for each racer, the finish, and what the checkpoint's card says."""

import html
from collections.abc import Sequence

import gradio as gr

from .checkpoint_card import CheckpointCard, Figure
from .race import MAX_CHARACTERS, Progress, Race

MAX_WAITING = 16  # visitors; a race has the machine for itself
CSS = """
.lane { display: grid; grid-template-columns: 1fr auto; column-gap: 1em; margin: 0.6em 0; }
.lane div { grid-column: 1 / -1; height: 0.6em; min-width: 2px; border-radius: 0.3em; background: var(--color-accent) }
"""
HOW = (
    "Live, one after another, so that none takes the machine from another. Times run from the call to the token, the "
    "prompt's reading included."
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
        finish = gr.HTML(padding=False)
        gr.Markdown(f"<small>{HOW} {race.setting}</small>")
        if card.figures:
            gr.Markdown(describe_figures(card.figures))

        def run(text: str):
            shown = dict.fromkeys((*columns, *times, finish), "")
            yield shown
            last: dict[int, Progress] = {}
            try:
                for index, progress in race.run(text):
                    last[index] = progress
                    shown |= {columns[index]: progress.text, times[index]: describe(progress)}
                    yield shown
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from None
            yield shown | {finish: describe_finish(race, list(last.values()))}

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
    fonts = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]  # the reader's own, none to load
    page.launch(
        server_name=host,
        server_port=port or None,
        theme=gr.themes.Default(font=fonts),
        css=CSS,
        ssr_mode=False,
        footer_links=["gradio", "settings"],
    )


# -------------------------------------------------------------------------------------------------------- what it says
def describe(progress: Progress) -> str:
    """The line below a response."""
    if progress.first_token_s is None:
        return "reads the prompt …"
    said = f"{progress.tokens} tokens, the first after {in_seconds(progress.first_token_s)}"
    if progress.seconds is None:
        return said
    speed, end = speed_of(progress), " · cut at its limit" if progress.is_cut else ""
    return f"**{in_seconds(progress.seconds)}** · **{speed:.{1 if speed < 10 else 0}f} tokens/s** · {said}{end}"


def describe_finish(race: Race, finished: Sequence[Progress]) -> str:
    """Who came first, and how many times as fast as the LLM each one writes, token for token, as HTML."""
    reference, slowest = finished[race.reference], max(seconds_of(progress) for progress in finished)
    ranked = sorted(zip(race.racers, finished, strict=True), key=lambda one: seconds_of(one[1]))
    lanes = []
    for racer, progress in ranked:
        seconds, times = seconds_of(progress), speed_of(progress) / speed_of(reference)
        said = "" if progress is reference else f"<b>{times:.1f}×</b> · "
        lanes.append(
            f'<div class="lane"><span>{html.escape(racer.title)}</span><span>{said}{in_seconds(seconds)}</span>'
            f'<div style="width: {100 * seconds / slowest:.1f}%"></div></div>'
        )
    than = f"the speed of “{html.escape(race.racers[race.reference].title)}”"
    first, times = ranked[0][0].title, speed_of(ranked[0][1]) / speed_of(reference)
    said = html.escape(first) + (f", {times:.1f} times {than}" if times > 1 else "")
    note = f"×: times {than}, token for token, since responses differ in length."
    return f"<h3>First: {said}</h3>{''.join(lanes)}<small>{note}</small>"


def seconds_of(progress: Progress) -> float:
    """How long a whole response took; never 0, so that one can divide by it."""
    return max(progress.seconds or 0.0, 1e-6)


def speed_of(progress: Progress) -> float:
    """Tokens a second of a whole response, the prompt's reading included; never 0."""
    return max(progress.tokens, 1) / seconds_of(progress)


def describe_figures(figures: Sequence[Figure]) -> str:
    """A card's scores, a line for each data set."""
    lines = ["The checkpoint's card says:"]
    for dataset in dict.fromkeys(figure.dataset for figure in figures):
        scores = [f"{figure.metric} **{figure.value}**" for figure in figures if figure.dataset == dataset]
        lines.append(f"- {dataset}: {' · '.join(scores)}")
    return "\n".join(lines)


def in_seconds(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f}\u00a0ms"
    return f"{seconds:.{2 if seconds < 10 else 1}f}\u00a0s"
