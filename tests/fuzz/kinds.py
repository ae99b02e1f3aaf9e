"""The kinds of input, and the module of each."""

KINDS = {
    "config": "config_json",
    "safetensors": "safetensors_file",
    "gguf": "gguf_file",
    "tokenizer": "tokenizer_files",
    "template": "chat_templates",
    "profile": "machine_profiles",
    "trace": "trace_files",
    "converted": "converted_folder",
    "flags": "command_flags",
    "api": "api_arguments",
    "policy": "own_policies",
}
