"""Encoding and writing in two servers: encoded prompts pass through a folder that both see.

    vllm serve CHECKPOINT --port 8001 --ec-transfer-config '{"ec_connector": "LLM2SLMPromptFolder",
        "ec_role": "ec_producer", "ec_connector_extra_config": {"shared_storage_path": "FOLDER"}}'

and the same with `"ec_role": "ec_consumer"` for a server that writes, without the LLM. vLLM's own connector of this
kind is for debugging: it may read a file that is not yet whole, and a prompt that was never encoded ends its server.
"""

import os
import tempfile

from safetensors.torch import save_file
from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector

from ..language_models import weights_id


class PromptFolder(ECExampleConnector):
    """
    Encoded prompts as files, `(length, slm_hidden_size)` each, by the hash of the checkpoint's name and the ids. Each
    checkpoint's weights have a folder of their own: a pair that is trained anew would misread what the old one read.
    """

    _storage_path: str

    def __init__(self, vllm_config, role):
        super().__init__(vllm_config, role)
        model = vllm_config.model_config
        self._storage_path = os.path.join(self._storage_path, weights_id(model.model, model.revision))
        self._never_encoded: set[str] = set()

    def save_caches(self, encoder_cache, mm_hash, **kwargs):
        """Writes an encoded prompt; the file appears when it is whole."""
        if not self.is_producer:
            return
        path = self._generate_filename_debug(mm_hash)
        handle, aside = tempfile.mkstemp(dir=os.path.dirname(path))
        os.close(handle)
        save_file({"ec_cache": encoder_cache[mm_hash].detach().cpu().contiguous()}, aside)
        os.replace(aside, path)

    def has_cache_item(self, identifier):
        """Whether the prompt has been encoded."""
        folder = self._generate_foldername_debug(identifier, create_folder=False)
        return os.path.exists(os.path.join(folder, "encoder_cache.safetensors"))

    def ensure_cache_available(self, request, num_computed_tokens):
        """Lets a prompt wait, to be failed, that a server without an LLM would have to encode."""
        if self.is_producer or all(self.has_cache_item(prompt.identifier) for prompt in request.mm_features):
            return True
        self._never_encoded.add(request.request_id)
        return False

    def take_unavailable_requests(self):
        """Those requests: each is answered with an error."""
        failed, self._never_encoded = self._never_encoded, set()
        return failed
