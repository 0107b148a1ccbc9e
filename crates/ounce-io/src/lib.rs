//! Bytes on disk: safetensors, tokenizers, datasets, token cache.
