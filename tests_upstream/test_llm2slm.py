"""
transformers' own tests of a model, run on four pairs by `make test-upstream`.

Each function of a test class here stands in the place of one of theirs and says why, in its docstring or in the reason
of its skip. docs/upstream_tests.md lists them.
"""

import tempfile
import unittest
from unittest import mock

import torch
from conftest import LLM_HIDDEN, LLM_KINDS, SLM_HIDDEN, SLM_KINDS, SLM_VOCAB, TRANSFORMERS_4
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers import T5Config
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration

LLM_VOCAB = SLM_VOCAB + 20  # test_resize_tokens_embeddings gives the prompt an id 10 above the SLM's vocabulary
SPECIAL_TOKENS = 4


class LLM2SLMModelTester:
    """A pair and its inputs; the sizes that upstream's tests ask for are the SLM's, whose states a pair returns."""

    batch_size = 3
    is_training = True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, SLM_HIDDEN
    seq_length = encoder_seq_length = decoder_seq_length = 7  # some tests take one for another

    def __init__(self, llm, slm):
        self.llm, self.slm = llm, slm
        self.has_llm = True  # or the inputs are the LLM's states
        self.padded = True

    def get_config(self):
        """A pair that contains its LLM, or one without it."""
        llm_config, slm_config = LLM_KINDS[self.llm](LLM_HIDDEN, LLM_VOCAB), SLM_KINDS[self.slm](SLM_HIDDEN, SLM_VOCAB)
        place = None if self.has_llm else "elsewhere"
        return LLM2SLMConfig.from_sub_configs(llm_config, slm_config, llm_name_or_path=place)

    def prepare_config_and_inputs_for_common(self):
        """A prompt, and a response without padding."""
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": ids_tensor(shape, LLM_VOCAB - SPECIAL_TOKENS) + SPECIAL_TOKENS,
            "attention_mask": random_attention_mask(shape) if self.padded else torch.ones(shape, dtype=torch.long),
            "decoder_input_ids": ids_tensor(shape, SLM_VOCAB - SPECIAL_TOKENS) + SPECIAL_TOKENS,
            "decoder_attention_mask": torch.ones(shape, dtype=torch.long),
        }
        if not self.has_llm:
            del inputs["input_ids"]
            inputs["prompt_hidden_states"] = torch.randn(*shape, LLM_HIDDEN)
        return self.get_config(), inputs


class LLM2SLMTests(GenerationTesterMixin, ModelTesterMixin):
    """What holds for every pair."""

    pair: tuple[str, str]
    all_model_classes = (LLM2SLMForConditionalGeneration,)
    is_encoder_decoder = True
    _is_composite = True
    test_pruning = False
    test_head_masking = False
    switched_off = {
        "test_pruning": "Heads are pruned in `model.llm` and `model.slm`, before a pair is made of them.",
        "test_head_masking": "`forward` takes no `head_mask`, which Transformers 5 has taken out of its models.",
    }

    def setUp(self):
        # Upstream decides by its classes' names what they are for, and so whether they take labels.
        known = mock.patch.dict(
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, llm2slm="LLM2SLMForConditionalGeneration"
        )
        known.start()
        self.addCleanup(known.stop)
        self.model_tester = LLM2SLMModelTester(*self.pair)

    @unittest.skip(
        "Weights that are missing in a file are an error, not a warning; tests/test_save_and_load.py has it."
    )
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        """The frozen LLM has no gradients to save memory on: the pair is trained on its states, without it."""
        self.model_tester.has_llm = False
        super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    def test_sdpa_can_dispatch_composite_models(self):
        """Upstream looks for a `vision_tower` and a `language_model`; a pair's parts are `llm` and `slm`."""
        model = LLM2SLMForConditionalGeneration(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            default = LLM2SLMForConditionalGeneration.from_pretrained(folder)
            eager = LLM2SLMForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
        for name in ("llm", "slm"):
            part = getattr(default, name)
            self.assertEqual(part.config._attn_implementation, "sdpa" if part._supports_sdpa else "eager")
            self.assertEqual(getattr(eager, name).config._attn_implementation, "eager")
        for module in eager.modules():
            if type(module).__name__.endswith("Attention") and getattr(module, "config", None) is not None:
                self.assertEqual(module.config._attn_implementation, "eager")

    def test_save_load_keys_to_ignore_on_save(self):
        """Transformers 4 looks for tied weights in the whole model's list, where a pair's parts have their own."""
        tied = None
        if TRANSFORMERS_4:
            model = LLM2SLMForConditionalGeneration(self.model_tester.get_config())
            parts = {"llm": model.llm._tied_weights_keys, "slm": model.slm._tied_weights_keys}
            tied = [f"{name}.{key}" for name, keys in parts.items() for key in keys or ()]
        with mock.patch.object(LLM2SLMForConditionalGeneration, "_tied_weights_keys", tied):
            super().test_save_load_keys_to_ignore_on_save()

    def test_retain_grad_hidden_states_attentions(self):
        """What is said of a padded prompt is returned in copies, where the caller had it: here is no padding."""
        self.model_tester.padded = False
        super().test_retain_grad_hidden_states_attentions()

    # --------------------------------------------------------------------------------------------------- generation
    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        """`generate` leaves out what is padding in every prompt, and its states lack it: here is no padding."""
        self.model_tester.padded = False
        return super().prepare_config_and_inputs_for_generate(batch_size)

    def _check_generate_outputs(self, output, config, **kwargs):
        """Layers, heads and vocabulary of what `generate` returns are the SLM's."""
        super()._check_generate_outputs(output, config.slm_config, **kwargs)

    @unittest.skip("There is no response without a prompt: the LLM has nothing to read.")
    def test_generate_without_input_ids(self):
        pass

    @unittest.skip("A pair is refused as `assistant_model`, which would give it the response for a prompt.")
    def test_assisted_decoding_sample(self):
        pass

    @unittest.skip("As for test_assisted_decoding_sample.")
    def test_assisted_decoding_matches_greedy_search_0_random(self):
        pass

    @unittest.skip("As for test_assisted_decoding_sample.")
    def test_assisted_decoding_matches_greedy_search_1_same(self):
        pass


class DecoderOnlySLMTests(LLM2SLMTests):
    """What holds for a pair whose SLM is decoder-only: prompt and response are one sequence to it."""

    def test_attention_outputs(self):
        """The SLM has one attention over prompt and response, so there are no `cross_attentions`, and more keys."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = LLM2SLMForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
        by_argument = model(**inputs, output_attentions=True)
        model.config.output_attentions = True
        by_config = model(**inputs)
        length, heads = self.model_tester.seq_length, self.model_tester.num_attention_heads
        for outputs in (by_argument, by_config):
            self.assertIsNone(outputs.cross_attentions)
            for attentions, keys in (
                (outputs.encoder_attentions, length),
                (outputs.decoder_attentions, 2 * length - 1),
            ):
                self.assertEqual(len(attentions), self.model_tester.num_hidden_layers)
                for weights in attentions:
                    self.assertEqual(weights.shape, (self.model_tester.batch_size, heads, length, keys))

    def test_retain_grad_hidden_states_attentions(self):
        """States and attentions are cut out of one sequence, so no gradient reaches them: it does the prompt's."""
        self.model_tester.padded = False
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        outputs = LLM2SLMForConditionalGeneration(config)(**inputs, output_hidden_states=True)
        outputs.encoder_last_hidden_state.retain_grad()
        outputs.logits.flatten()[0].backward()
        self.assertTrue(outputs.encoder_last_hidden_state.grad.any())

    # --------------------------------------------------------------------------------------------------- generation
    def _check_generate_outputs(self, output, config, **kwargs):
        """Transformers always caches what a decoder-only model makes of embeddings, `use_cache=False` or not."""
        super()._check_generate_outputs(output, config, **kwargs | {"use_cache": True})

    def _greedy_generate(self, model, *args, **kwargs):
        """Upstream counts the prompt to what a decoder-only model wrote, as a pair does not: it is put in front."""
        return behind_prompt(model, super()._greedy_generate(model, *args, **kwargs))

    def _sample_generate(self, model, *args, **kwargs):
        """As `_greedy_generate`."""
        return behind_prompt(model, super()._sample_generate(model, *args, **kwargs))

    def _beam_search_generate(self, model, *args, **kwargs):
        """As `_greedy_generate`."""
        return behind_prompt(model, super()._beam_search_generate(model, *args, **kwargs))

    def _beam_sample_generate(self, model, *args, **kwargs):
        """As `_greedy_generate`."""
        return behind_prompt(model, super()._beam_sample_generate(model, *args, **kwargs))

    @unittest.skip("Prompt lookup needs the prompt as ids of the SLM, which reads embeddings: `generate` refuses it.")
    def test_prompt_lookup_decoding_matches_greedy_search(self):
        pass


def behind_prompt(model, output):
    """What a decoder-only model of upstream's would have returned for `output`."""
    model.config.is_encoder_decoder = False  # what upstream asks, to know how long a response has to be
    prompt = (LLM2SLMModelTester.seq_length, 0)
    if isinstance(output, torch.Tensor):
        return torch.nn.functional.pad(output, prompt)
    output.sequences = torch.nn.functional.pad(output.sequences, prompt)
    return output


class T5T5Test(LLM2SLMTests, unittest.TestCase):
    """A T5 encoder and a T5: both encoder-decoders."""

    pair = ("t5", "t5")

    def test_attn_implementation_composite_models(self):
        """Upstream sets the attention on what `get_text_config(decoder=True)` gives: T5's is a copy."""
        with mock.patch.object(T5Config, "get_text_config", lambda config, decoder=None, encoder=None: config):
            super().test_attn_implementation_composite_models()

    @unittest.skip("T5's encoder and its stacks have configurations of their own, in T5 itself too.")
    def test_internal_model_config_and_subconfig_are_same(self):
        pass


class LlamaLlamaTest(DecoderOnlySLMTests, unittest.TestCase):
    """Two decoder-only models of one kind."""

    pair = ("llama", "llama")


class BertGPT2Test(DecoderOnlySLMTests, unittest.TestCase):
    """An encoder, and a decoder-only model with learned positions and tied embeddings."""

    pair = ("bert", "gpt2")


class Gemma3LlamaTest(DecoderOnlySLMTests, unittest.TestCase):
    """A decoder-only LLM with a sliding window."""

    pair = ("gemma3", "llama")
