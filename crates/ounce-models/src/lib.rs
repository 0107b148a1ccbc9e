//! Hugging Face config.json to forward Graph, one file per family.
