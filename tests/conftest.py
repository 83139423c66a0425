"""Tiny random models and tokenizers, built offline: each kind of LLM and SLM in the shape its users know."""

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    StoppingCriteria,
    T5Config,
    T5GemmaConfig,
    T5GemmaModuleConfig,
)

from llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMTokenizer
from llm2slm.benchmark import machine_speed
from llm2slm.cli import main as cli

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
sys.path.append(str(Path(__file__).parents[1] / "experiments"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
TRANSFORMERS_4 = transformers.__version__.startswith("4.")


@pytest.fixture(autouse=True, scope="module")
def no_garbage_is_looked_for_in_what_was_imported():
    """To look through a million objects takes longer than a tiny model's few steps."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_mixed_precision_left_behind(monkeypatch):
    """In Transformers 4 a training with bf16 sets this variable, and the next one in the process follows it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(autouse=True)
def quick_trainings(monkeypatch):
    """
    A tiny model trains in less time than it takes to draw its loss curve, which `test_train.py` does, and to look for
    garbage before the first step.
    """
    monkeypatch.setattr("llm2slm.training.record.plot_losses", lambda history, title, path, taught=False: path.touch())
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)


@pytest.fixture
def quick_probe(monkeypatch):
    """What a benchmark measures the machine with takes a moment instead of seconds."""
    monkeypatch.setattr(machine_speed, "SECONDS_EACH", 0.02)
    monkeypatch.setattr(machine_speed, "READ_SHAPE", (256, 256))


# ---------------------------------------------------------------------------------------------------------- tokenizers
PAD, EOS, BOS, UNK = range(4)
WORDS = ["user", "assistant", *(f"w{i}" for i in range(54))]
CHARACTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
MERGES = [("▁", character) for character in "abcdefghijklmnopqrstuvw"]
LLM_VOCAB, SLM_VOCAB = 4 + len(WORDS), 4 + len(CHARACTERS) + len(MERGES)  # 60 and 64
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def build_llm_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """Words, an end token behind each prompt, and a chat template."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[END]", "[START]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", EOS)])
    special = {"pad_token": "[PAD]", "eos_token": "[END]", "bos_token": "[START]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special, **kwargs)


def build_slm_tokenizer(template: str = "$A") -> PreTrainedTokenizerFast:
    """Letters, and letters behind a space; `template` says which special tokens it puts around a text."""
    tokens = ["<pad>", "</s>", "<s>", "<unk>", *CHARACTERS, *("".join(merge) for merge in MERGES)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special_tokens = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


@pytest.fixture
def llm_tokenizer():
    return build_llm_tokenizer()


@pytest.fixture
def slm_tokenizer():
    return build_slm_tokenizer()


@pytest.fixture
def tokenizer(llm_tokenizer, slm_tokenizer):
    return LLM2SLMTokenizer.from_tokenizers(llm_tokenizer, slm_tokenizer)


# -------------------------------------------------------------------------------------------------------------- models
LLM_HIDDEN, SLM_HIDDEN, POSITIONS = 24, 32, 64
SPECIAL_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}


def t5(hidden, vocab):
    shape = {"d_model": hidden, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5Config(vocab_size=vocab, dropout_rate=0.0, decoder_start_token_id=PAD, **shape, **SPECIAL_IDS)


def t5gemma(hidden, vocab):
    shape = {"hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    attention = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "max_position_embeddings": POSITIONS}
    stack = T5GemmaModuleConfig(vocab_size=vocab, **shape, **attention, **SPECIAL_IDS)
    return T5GemmaConfig(encoder=stack.to_dict(), decoder=stack.to_dict(), vocab_size=vocab, **SPECIAL_IDS)


def bert(hidden, vocab, config_class=BertConfig):
    shape = {"hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return config_class(vocab_size=vocab, max_position_embeddings=POSITIONS, **shape, **SPECIAL_IDS)


def roberta(hidden, vocab):
    return bert(hidden, vocab, RobertaConfig)


def bart(hidden, vocab, config_class=BartConfig):
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    shape = {"d_model": hidden, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    dropouts = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    ids = {**SPECIAL_IDS, "decoder_start_token_id": BOS, "forced_eos_token_id": None}
    return config_class(vocab_size=vocab, max_position_embeddings=POSITIONS, **heads, **shape, **dropouts, **ids)


def marian(hidden, vocab):
    config = bart(hidden, vocab, MarianConfig)
    config.update({"scale_embedding": True, "decoder_start_token_id": PAD, "decoder_vocab_size": vocab})
    return config


def llama(hidden, vocab, config_class=LlamaConfig, **fields):
    shape = {"hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    attention = {"num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    return config_class(vocab_size=vocab, **shape, **attention, **SPECIAL_IDS, **fields)


def qwen2(hidden, vocab):
    return llama(hidden, vocab, Qwen2Config, tie_word_embeddings=True)


def gemma3(hidden, vocab):
    """A sliding window shorter than the prompts, and one layer that sees everything."""
    layer_types = ["sliding_attention", "full_attention"]
    return llama(hidden, vocab, Gemma3TextConfig, head_dim=8, sliding_window=4, layer_types=layer_types)


def gpt2(hidden, vocab):
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_embd": hidden, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return GPT2Config(vocab_size=vocab, **shape, **dropouts, **SPECIAL_IDS)


LLM_KINDS = {f.__name__: f for f in (t5, t5gemma, bert, bart, roberta, llama, gemma3, gpt2)}
SLM_KINDS = {f.__name__: f for f in (t5, bart, marian, llama, gpt2, qwen2, gemma3)}
FUSIONS = {
    "replace": {},
    "add_shared": {"fusion": "add", "shared_tokenizer": True},
    "add_different": {"fusion": "add"},
}


@torch.no_grad()
def jitter(module, std=0.3):
    """Moves the weights from where they start: biases from 0, norms from 1, matrices far, so that outputs vary."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * (std if parameter.ndim > 1 else std / 5))
    return module


def build_llm(kind="llama", seed=0):
    torch.manual_seed(seed)
    config = LLM_KINDS[kind](LLM_HIDDEN, LLM_VOCAB)
    if config.is_encoder_decoder:
        llm = AutoModelForSeq2SeqLM.from_config(config)
    elif kind in ("bert", "roberta"):
        llm = transformers.AutoModel.from_config(config)
    else:
        llm = AutoModelForCausalLM.from_config(config)
    return jitter(llm).eval()


def build_slm(kind="t5", seed=1):
    torch.manual_seed(seed)
    config = SLM_KINDS[kind](SLM_HIDDEN, SLM_VOCAB)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return jitter(auto_class.from_config(config)).eval()


def build_model(llm="llama", slm="t5", llm_kwargs=None, **config) -> LLM2SLMForConditionalGeneration:
    """`llm` and `slm` are kinds; `llm` may also be the folder of a saved LLM, which makes the checkpoint slim."""
    llm = build_llm(llm) if llm in LLM_KINDS else llm
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(
        llm, build_slm(slm), llm_kwargs=llm_kwargs, **config
    )
    torch.manual_seed(2)
    jitter(model.projector)
    return model


@pytest.fixture
def llm_folder(tmp_path):
    build_llm("llama").save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


# ----------------------------------------------------------------------------------------------- prompts and responses
def build_prompts(lengths=(5, 9, 3), seed=3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, LLM_VOCAB, (length,), generator=generator) for length in lengths]


def padded(prompts, side="left") -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), PAD)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        place = slice(length - len(prompt), length) if side == "left" else slice(len(prompt))
        ids[i, place], mask[i, place] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def build_labels(rows=3, length=6, seed=4) -> torch.Tensor:
    labels = torch.randint(4, SLM_VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels[1::2, length - 2 :] = -100
    return labels


def response_tokens(model, row) -> list[int]:
    """What the SLM wrote, up to the end token."""
    tokens = row.tolist()[1:] if model.config.slm_config.is_encoder_decoder else row.tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def response_length(model, ids) -> int:
    return ids.shape[1] - model.config.slm_config.is_encoder_decoder


def count_hooks(module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.fixture
def count_calls():
    """A function that counts a module's forwards from then on; its result grows by one entry for each."""
    handles = []

    def count(module):
        calls = []
        handles.append(module.register_forward_pre_hook(lambda *_: calls.append(1)))
        return calls

    yield count
    for handle in handles:
        handle.remove()


# -------------------------------------------------------------------------------------------- a drafter beside its LLM
PROMPT = build_prompts((9,))[0][None]
# Tiny random models fall into repeating one token; forbidding pairs of tokens to come twice keeps them writing.
VARIED = {"no_repeat_ngram_size": 2}


def build_drafter(llm, slm, **config) -> LLM2SLMForConditionalGeneration:
    """A model that drafts for `llm`, without an LLM of its own."""
    config = {"shared_tokenizer": True, "llm_layer": [0, 1, -1], **config}
    model = LLM2SLMForConditionalGeneration.from_llm_slm_pretrained(llm, slm, **config)
    jitter(model.projector)
    model.llm = None
    return model


def build_slm_of_the_llms_vocabulary(kind):
    torch.manual_seed(4)
    config = SLM_KINDS[kind](SLM_HIDDEN, LLM_VOCAB)
    return jitter(type(build_slm(kind))(config)).eval()


def as_slm(llm, noise=0.0) -> torch.nn.Module:
    torch.manual_seed(5)
    return jitter(copy.deepcopy(llm), noise)


def build_copying_drafter(llm, noise=0.0) -> LLM2SLMForConditionalGeneration:
    """The SLM is a copy of the LLM, the projector adds nothing: without noise it drafts what the LLM will write."""
    model = build_drafter(llm, as_slm(llm, noise), fusion="add")
    torch.nn.init.zeros_(model.projector.out.weight)
    torch.nn.init.zeros_(model.projector.out.bias)
    return model


def endless(llm):
    llm.generation_config.eos_token_id = None
    return llm


def greedy(llm, prompt=PROMPT, **kwargs) -> torch.Tensor:
    """The LLM's own response."""
    if llm.config.model_type == "t5gemma":
        kwargs["use_cache"] = False  # in Transformers 4 its cached cross-attention sees the sliding window only
    ids = llm.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **kwargs)
    return ids if llm.config.is_encoder_decoder else ids[:, prompt.shape[1] :]


@pytest.fixture
def llm():
    return endless(build_llm("llama"))


@pytest.fixture
def noisy(llm):
    """A drafter that is right about half of the time."""
    return build_copying_drafter(llm, noise=0.1)


def trimmed_slm(llm, token_ids):
    """A copy of the LLM that knows only some of its tokens, in another order."""
    config = copy.deepcopy(llm.config)
    config.vocab_size = len(token_ids)
    config.decoder_start_token_id = token_ids.index(PAD)
    weights = {k: w[token_ids] if w.shape[0] == LLM_VOCAB else w for k, w in llm.state_dict().items()}
    slm = type(llm)(config).eval()
    slm.load_state_dict(weights)
    return slm


def build_trimmed_drafter(llm, lacking=()):
    token_ids = [token for token in range(LLM_VOCAB - 1, -1, -1) if token not in lacking]
    token_map = torch.full((LLM_VOCAB,), -1)
    token_map[token_ids] = torch.arange(len(token_ids))
    slm = trimmed_slm(llm, token_ids)
    model = build_drafter(llm, slm, fusion="add", prompt_token_map=token_map)
    torch.nn.init.zeros_(model.projector.out.weight)
    torch.nn.init.zeros_(model.projector.out.bias)
    return model


class EndsAfter(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] == PROMPT.shape[1] + self.tokens])


class Collects:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


# ----------------------------------------------------------------------------------------------------- fresh processes
RUNNER = """
import contextlib, io, json, sys, traceback

found = {}
for name, code in json.load(sys.stdin).items():
    error = None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
    found[name] = [out.getvalue(), err.getvalue(), error]
print(json.dumps(found))
"""


def run_fresh(codes: dict[str, str], before: str = "", **options) -> dict[str, tuple[str, str, str | None]]:
    """
    Runs some codes one after the other in one fresh process, of which the imports are the dear part.

    Returns, for each, what it wrote to stdout and to stderr, and its error. `before` runs first, and `options` are
    those of `subprocess.run`.
    """
    command, given = [sys.executable, "-c", f"{before}\n{RUNNER}"], json.dumps(codes)
    result = subprocess.run(command, input=given, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: tuple(found) for name, found in json.loads(result.stdout.splitlines()[-1]).items()}


# ------------------------------------------------------------------------------------------------------------ training
QUICK_TRAINING = {
    "slm": "fresh",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "learning_rate": 0.01,
    "use_cpu": True,
    "disable_tqdm": True,
}


def train(recipe, **changes) -> int | str | None:
    """What `llm2slm train` returns for a recipe and changes to it, of which None leaves an option out."""
    options = {name: value for name, value in {**recipe, **changes}.items() if value is not None}
    path = Path(f"{options['cache_dir']}.yaml")
    path.write_text(yaml.safe_dump(options))
    return cli.main(["train", "--config", str(path)])


def read_report(folder) -> dict:
    """What a finished training says of itself."""
    return json.loads((Path(folder) / "run.json").read_text())


def save_training(folder, pairs):
    """Writes a tiny LLM and 40 pairs into `folder`; a recipe that trains a fresh SLM on 32 and evaluates on 8."""
    build_llm("llama").save_pretrained(folder / "llm")
    build_llm_tokenizer().save_pretrained(folder / "llm")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {
        "data": str(folder / "pairs.jsonl"),
        "train_split": "train[:32]",
        "validation_split": "train[32:]",
        "llm": str(folder / "llm"),
        "vocab_size": 300,
        "logging_steps": 1,
        **QUICK_TRAINING,
    }
