"""Configuration of LLM-to-SLM: two sub-configs (LLM and SLM) and the projector between them.

One of the files copied into every checkpoint: it imports nothing but transformers, and works on both 4.x and 5.x.
"""

from string import Formatter

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

FUSIONS = ("replace", "add")
PROJECTOR_TYPES = ("mlp", "linear")
PROJECTOR_NORMS = ("layer_norm", "standardize", None)

AUTO_MAP = {
    "AutoConfig": "configuration_llm2slm.LLM2SLMConfig",
    "AutoModel": "modeling_llm2slm.LLM2SLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_llm2slm.LLM2SLMForConditionalGeneration",
}
# Transformers 5 removed the text2text-generation task; a checkpoint brings it back, and pipeline() looks here first.
CUSTOM_PIPELINES = {
    "text2text-generation": {
        "impl": "pipeline_llm2slm.LLM2SLMText2TextGenerationPipeline",
        "pt": ["AutoModelForSeq2SeqLM"],
        "type": "text",
    }
}
# The fields that say where the LLM is loaded from.
LLM_PLACE = ("llm_name_or_path", "llm_install", "llm_revision", "llm_gguf_file")
# The SLM writes the response: what its tokens are is said once, in its own configuration.
SLM_TOKENS = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")


def _slm_token(name: str) -> property:
    def get(config):
        return getattr(config.slm_config, name, None)

    def set_(config, value):
        if value != get(config):
            setattr(config.slm_config, name, value)

    return property(get, set_, doc=f"The SLM's `{name}`.")


class LLM2SLMConfig(PretrainedConfig):
    r"""
    Configuration of [`LLM2SLMForConditionalGeneration`]. Only what it adds to `PretrainedConfig` is listed.

    Args:
        llm_config (`dict` or `PretrainedConfig`, *optional*, defaults to a `T5Config`):
            The frozen LLM that encodes the prompt: an encoder-decoder (its encoder is used), an encoder, or a
            decoder-only model.
        slm_config (`dict` or `PretrainedConfig`, *optional*, defaults to a `T5Config`):
            The small language model that writes the response: encoder-decoder or decoder-only.
        fusion (`str`, *optional*, defaults to `"replace"`):
            `"replace"`: the SLM's prompt embeddings are the projected LLM states. `"add"`: they are the prompt's
            own embeddings plus the projected LLM states (paper, section 3.2).
        shared_tokenizer (`bool`, *optional*, defaults to `False`):
            Whether the SLM's tokenizer is the LLM's. It decides what `"add"` adds to: the SLM's own embeddings of the
            prompt if it is, otherwise the LLM's input embeddings through a learned linear layer. An SLM vocabulary
            smaller than the LLM's is the LLM's, trimmed: the model then has a `prompt_token_map`.
        projector_type (`str`, *optional*, defaults to `"mlp"`):
            `"mlp"` (linear, activation, linear, as in the paper) or `"linear"`.
        projector_hidden_size (`int`, *optional*, defaults to the SLM's hidden size):
            Width between the two layers of the `"mlp"` projector.
        projector_hidden_act (`str`, *optional*, defaults to `"relu"`):
            Activation of the `"mlp"` projector.
        projector_norm (`str`, *optional*, defaults to `"layer_norm"`):
            Normalisation of each LLM layer's states before the projector: `"layer_norm"`; `"standardize"`, each
            number less its mean and over its standard deviation, which are constants that
            [`~llm2slm.building.standardize_states`] measures; or `None`. The inner layers of a decoder-only LLM are
            hundreds of times larger than its embeddings, and some of their numbers hundreds of times the others.
        llm_layer (`int` or `list[int]`, *optional*, defaults to -1):
            Which hidden states of the LLM are read, counted as in `output_hidden_states`: 0 is the input of the first
            layer, `k` the output of layer `k`, -1 the last, after the final norm. States of several layers are
            concatenated. Layers above the highest one are neither run nor kept.
        prompt_format (`str`, *optional*):
            What the model was trained to read for a text, such as `"{prompt}\n"`: a record. It is the tokenizer that
            puts texts into its own `prompt_format`, which is this one for a tokenizer saved without.
        llm_name_or_path (`str`, *optional*):
            Where the frozen LLM is loaded from: a name on the Hub, a folder, or `package:NAME` for an installed Python
            package that holds it. Checkpoints without it contain the LLM.
        llm_install (`str`, *optional*):
            The command that installs that Python package, and what reads it: said where one is missing.
        llm_revision (`str`, *optional*):
            Commit of the LLM's Hub repository.
        llm_gguf_file (`str`, *optional*):
            Name of the GGUF file, if the LLM is one.
        llm_alternatives (`list[dict]`, *optional*):
            Other places of the same LLM, tried in this order where it cannot be loaded from `llm_name_or_path`: each
            has its `llm_name_or_path` and, where they apply, `llm_install`, `llm_revision` and `llm_gguf_file`.
        llm_fingerprint (`dict[str, str]`, *optional*):
            Sampled weights of the LLM (bfloat16, hexadecimal) by parameter name, checked when it is loaded.
        include_llm (`bool`, *optional*, defaults to `False`):
            Whether the checkpoint contains the LLM's weights.

    Raises:
        ValueError: for an unknown `fusion`, `projector_type` or `projector_norm`, an `llm_layer` the LLM does not
            have, a `prompt_format` without the prompt or with something else to fill in, and an alternative of the
            LLM that names no place or has other fields.
    """

    model_type = "llm2slm"
    is_composition = True
    sub_configs = {"llm_config": AutoConfig, "slm_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "encoder_last_hidden_state"]

    def __init__(
        self,
        llm_config=None,
        slm_config=None,
        fusion="replace",
        shared_tokenizer=False,
        projector_type="mlp",
        projector_hidden_size=None,
        projector_hidden_act="relu",
        projector_norm="layer_norm",
        llm_layer=-1,
        prompt_format=None,
        llm_name_or_path=None,
        llm_install=None,
        llm_revision=None,
        llm_gguf_file=None,
        llm_alternatives=None,
        llm_fingerprint=None,
        include_llm=False,
        **kwargs,
    ):
        self.llm_config = _as_config(llm_config)
        self.slm_config = _as_config(slm_config)
        self.fusion = fusion
        self.shared_tokenizer = shared_tokenizer
        self.projector_type = projector_type
        self.projector_hidden_size = projector_hidden_size or self.slm_hidden_size
        self.projector_hidden_act = projector_hidden_act
        self.projector_norm = projector_norm
        self.llm_layer = llm_layer
        self.prompt_format = prompt_format
        self.llm_name_or_path = llm_name_or_path
        self.llm_install = llm_install
        self.llm_revision = llm_revision
        self.llm_gguf_file = llm_gguf_file
        self.llm_alternatives = llm_alternatives
        self.llm_fingerprint = llm_fingerprint
        self.include_llm = include_llm
        self._validate_choices()

        for name in SLM_TOKENS:  # given or not, they are the SLM's
            kwargs.setdefault(name, getattr(self, name))
        kwargs.setdefault("is_encoder_decoder", True)
        kwargs["tie_word_embeddings"] = self.tie_word_embeddings  # Transformers 4 sets what it is not given
        super().__init__(**kwargs)

    def _validate_choices(self):
        for name, value, allowed in (
            ("fusion", self.fusion, FUSIONS),
            ("projector_type", self.projector_type, PROJECTOR_TYPES),
            ("projector_norm", self.projector_norm, PROJECTOR_NORMS),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"`projector_hidden_act` must be an activation of Transformers, such as 'relu' or 'gelu', got "
                f"{self.projector_hidden_act!r}."
            )
        if not isinstance(self.projector_hidden_size, int) or self.projector_hidden_size < 1:
            raise ValueError(
                f"`projector_hidden_size` must be a positive integer, got {self.projector_hidden_size!r}."
            )
        check_prompt_format(self.prompt_format)
        for place in self.llm_alternatives or []:
            if not isinstance(place, dict) or not {"llm_name_or_path"} <= set(place) <= set(LLM_PLACE):
                raise ValueError(
                    f"`llm_alternatives` must be dictionaries with `llm_name_or_path` and, if needed, "
                    f"{', '.join(f'`{name}`' for name in LLM_PLACE[1:])}; got {place!r}."
                )
        num_layers = self.llm_text_config.num_hidden_layers
        layers = self.llm_layer if isinstance(self.llm_layer, (list, tuple)) else [self.llm_layer]
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not -num_layers - 1 <= layer <= num_layers:
                raise ValueError(
                    f"`llm_layer` must be an integer from {-num_layers - 1} to {num_layers} or a list of them (the "
                    f"LLM has {num_layers} layers, 0 is the input of the first), got {self.llm_layer!r}."
                )
        if not layers:
            raise ValueError("`llm_layer` must name at least one layer, got an empty list.")

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Builds the configuration from its fields; raises a `ValueError` for another kind of model's."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"This is the configuration of a {config_dict['model_type']!r} model, not of an LLM-to-SLM pair. To "
                "make a pair with it, call `LLM2SLMForConditionalGeneration.from_llm_slm_pretrained`."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_sub_configs(cls, llm_config: PretrainedConfig, slm_config: PretrainedConfig, **kwargs) -> "LLM2SLMConfig":
        """Builds the configuration from the two models' configurations, which are copied."""
        fields = llm_config.to_dict()
        fields.pop("quantization_config", None)  # how the LLM was loaded here, not what it is
        return cls(llm_config=fields, slm_config=slm_config.to_dict(), **kwargs)

    pad_token_id = _slm_token("pad_token_id")
    eos_token_id = _slm_token("eos_token_id")
    bos_token_id = _slm_token("bos_token_id")

    @property
    def decoder_start_token_id(self) -> int:
        """
        The SLM's. A decoder-only SLM has none, it starts from the prompt's last position: an id that only fills the
        place, by convention.
        """
        slm = self.slm_config
        candidates = (getattr(slm, "decoder_start_token_id", None), self.bos_token_id, self.pad_token_id, 0)
        return next(token for token in candidates if token is not None)

    @decoder_start_token_id.setter
    def decoder_start_token_id(self, value: int | None):
        if value != self.decoder_start_token_id:
            self.slm_config.decoder_start_token_id = value

    @property
    def llm_text_config(self) -> PretrainedConfig:
        """The part of `llm_config` that describes what reads the prompt (the encoder's, for T5Gemma)."""
        config = self.llm_config
        if config.is_encoder_decoder:  # T5Gemma nests an encoder's config; T5 and BART are flat
            config = getattr(config, "encoder", config)
        return config.get_text_config()

    @property
    def llm_places(self) -> list[dict[str, str | None]]:
        """Where the LLM can be loaded from, each place with all fields of `LLM_PLACE`: its own, then alternatives."""
        if self.llm_name_or_path is None:
            return []
        own = {name: getattr(self, name) for name in LLM_PLACE}
        return [own, *({**dict.fromkeys(LLM_PLACE), **place} for place in self.llm_alternatives or [])]

    @property
    def llm_layers(self) -> list[int]:
        """The layers given to the projector, as non-negative indices."""
        layers = self.llm_layer if isinstance(self.llm_layer, (list, tuple)) else [self.llm_layer]
        return [layer % (self.llm_text_config.num_hidden_layers + 1) for layer in layers]

    @property
    def adds_llm_embeddings(self) -> bool:
        """Whether the projected states are added to a projection of the LLM's input embeddings."""
        return self.fusion == "add" and not self.shared_tokenizer

    @property
    def maps_prompt_tokens(self) -> bool:
        """Whether the SLM's tokenizer is the LLM's, trimmed: the model then maps prompt ids to the SLM's."""
        return self.shared_tokenizer and self.vocab_size < self.llm_text_config.vocab_size

    @property
    def prompt_layers(self) -> list[int]:
        """The layers in `prompt_hidden_states`: `llm_layers`, and layer 0 behind them if its states are added to."""
        needs_embeddings = self.adds_llm_embeddings and 0 not in self.llm_layers
        return self.llm_layers + [0] * needs_embeddings

    @property
    def prompt_hidden_size(self) -> int:
        """Width of `prompt_hidden_states`: the LLM's hidden size for each of `prompt_layers`."""
        return len(self.prompt_layers) * self.llm_hidden_size

    @property
    def llm_hidden_size(self) -> int:
        """Width of the LLM's hidden states."""
        return self.llm_text_config.hidden_size

    @property
    def slm_hidden_size(self) -> int:
        """Width of the SLM's embeddings."""
        return self.slm_config.get_text_config().hidden_size

    @property
    def hidden_size(self) -> int:
        """The SLM's: what a training library asks a configuration for."""
        return self.slm_hidden_size

    @property
    def vocab_size(self) -> int:
        """The SLM's: `labels` and generated ids are below it."""
        return self.slm_config.get_text_config().vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int):
        self.slm_config.get_text_config().vocab_size = value

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the SLM's head is its token embeddings: what PEFT asks before it adapts one of them."""
        return getattr(self.slm_config, "tie_word_embeddings", False)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool):
        self.slm_config.tie_word_embeddings = value

    def get_text_config(self, decoder=None, encoder=None) -> PretrainedConfig:
        """The SLM's configuration, or the LLM's if only the encoder's is asked for."""
        if encoder and not decoder:
            return self.llm_text_config
        return self.slm_config.get_text_config(decoder=decoder) if decoder else self.slm_config.get_text_config()

    def to_dict(self) -> dict:
        """Serializes the configuration; the code map is always this checkpoint's own files, wherever it came from."""
        output = super().to_dict()
        for part in ("llm_config", "slm_config"):  # where its files were is no part of what the model is
            if isinstance(output.get(part), dict):
                output[part].pop("_name_or_path", None)
        output |= {name: getattr(self, name) for name in SLM_TOKENS}
        output["tie_word_embeddings"] = self.tie_word_embeddings
        output["auto_map"] = dict(AUTO_MAP)
        output["custom_pipelines"] = {task: dict(spec) for task, spec in CUSTOM_PIPELINES.items()}
        return output


def check_prompt_format(prompt_format: str | None):
    """Raises a `ValueError` if a format of prompts has no place for the prompt, or one for something else."""
    if prompt_format is None:
        return
    try:
        fields = [field for _, field, _, _ in Formatter().parse(prompt_format) if field is not None]
    except ValueError:  # a single brace
        fields = []
    if not fields or set(fields) != {"prompt"}:
        raise ValueError(f"`prompt_format` must have {{prompt}} in it, and no other braces, got {prompt_format!r}.")


def _as_config(config) -> PretrainedConfig:
    if config is None:
        return AutoConfig.for_model("t5")
    if isinstance(config, dict):
        fields = {k: v for k, v in config.items() if k != "model_type"}
        config = AutoConfig.for_model(config["model_type"], **fields)
        read_rope_parameters(config)
    return config


def read_rope_parameters(config: PretrainedConfig) -> bool:
    """
    Transformers 5 writes `rope_parameters`. 4 does not read them: it would turn positions by its own defaults. Sets
    what 4 reads, in `config` and its parts; returns whether there was something to set.
    """
    parts = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    found = [_read_own_rope_parameters(part) for part in (config, *parts)]
    return any(found)


def _read_own_rope_parameters(config: PretrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None)
    if not rope or not hasattr(config, "rope_theta"):  # a field of Transformers 4
        return False
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)  # Gemma 3 has one for each
    if local is not None:
        config.rope_local_base_freq = local["rope_theta"]
    config.rope_theta = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        config.partial_rotary_factor = rope["partial_rotary_factor"]
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    config.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling
    return True


__all__ = ["LLM2SLMConfig"]
