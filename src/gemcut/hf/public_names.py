"""What to use in place of the public names of transformers that this front door does not have: plain data.

Each table maps a name to a half sentence that follows "… has no attribute 'name': ". A test compares the tables with
the transformers that is installed: every public name is either there or has an answer here.
"""

from __future__ import annotations


def _table(*groups: tuple[str, str]) -> dict[str, str]:
    return {name: answer for names, answer in groups for name in names.split()}


_TRAINING = "gemcut is for inference and computes no gradients; train with transformers, then load the result"
_ADAPTERS = "adapters are not in this version; merge it into its base with peft (merge_and_unload), then load that"
_ONE_DEVICE = "a model is on one device in this version; choose it with device_map or to()"
_FIXED_NETWORK = "the network is fixed once it is loaded; change the checkpoint with transformers and load it again"
_HOOKS = "gemcut's layers are fused and call no hooks; model(..., output_hidden_states=True) gives each layer's output"
_BATCHING = "requests are always batched continuously; give generate a list, or use gemcut.Gemma"
_UPLOAD = "save_pretrained writes the folder; upload that with `hf upload`"
_DTYPE = "the dtype is chosen at loading: from_pretrained(..., dtype=...)"
_OTHER_DEVICE = "gemcut runs on the CPU and on NVIDIA GPUs; use to('cpu') or to('cuda')"
_INTERNAL = "it is part of how transformers loads and runs its own models; gemcut has nothing of that kind"
_LOADING = "from_pretrained loads everything; give it the name of a checkpoint"
_ATTENTION = "it is chosen at loading: from_pretrained(..., attn_implementation=...)"
_KERNELS = "gemcut chooses its own kernels; `gemcut info --kernels` lists them"
_KINDS = "gemcut reads text models alone: text goes in and text comes out"

MODEL = _table(
    (
        "activation_checkpointing_disable activation_checkpointing_enable is_activation_checkpointing "
        "gradient_checkpointing_disable gradient_checkpointing_enable is_gradient_checkpointing "
        "supports_gradient_checkpointing zero_grad enable_input_require_grads "
        "disable_input_require_grads init_weights initialize_weights loss_function",
        _TRAINING,
    ),
    (
        "active_adapters add_adapter delete_adapter disable_adapters enable_adapters enable_peft_hotswap "
        "get_adapter_state_dict load_adapter set_adapter",
        _ADAPTERS,
    ),
    (
        "barrier_after_gathered_checkpoint_save ep_plan fsdp_plan fsdp_size gather_sharded_state_dict_for_save "
        "init_parallel_plans is_distributed_loading_by_transformers maybe_distribute_model pp_plan "
        "prepare_distribute_model save_distributed_checkpoint should_save_on_this_rank supports_context_parallel "
        "supports_pp_plan supports_tp_plan tp_plan tp_size hf_device_map_plan parallelize deparallelize share_memory",
        _ONE_DEVICE,
    ),
    (
        "add_module register_buffer register_module register_parameter resize_position_embeddings "
        "resize_token_embeddings set_decoder set_encoder set_input_embeddings set_output_embeddings set_submodule "
        "tie_weights load_state_dict set_extra_state dequantize apply to_empty prune_heads",
        _FIXED_NETWORK,
    ),
    (
        "register_backward_hook register_forward_hook register_forward_pre_hook register_full_backward_hook "
        "register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook "
        "register_state_dict_post_hook register_state_dict_pre_hook can_record_outputs",
        _HOOKS,
    ),
    (
        "continuous_batching_context_manager destroy_cached_continuous_batching_manager generate_batch "
        "init_continuous_batching",
        _BATCHING,
    ),
    ("push_to_hub add_model_tags model_tags register_for_auto_class create_model_card", _UPLOAD),
    ("double type", _DTYPE),
    ("ipu mtia xpu", _OTHER_DEVICE),
    (
        "get_correct_attn_implementation set_attn_implementation is_backend_compatible "
        "get_correct_experts_implementation get_experts_implementation set_experts_implementation",
        _ATTENTION,
    ),
    ("set_use_kernels use_kernels", _KERNELS),
    ("compile get_compiled_call", "gemcut has kernels of its own; nothing is compiled with torch.compile"),
    (
        "T_destination call_super_init dump_patches dummy_inputs extra_repr get_extra_state "
        "get_expanded_tied_weights_keys get_init_context get_parameter_or_buffer is_custom_code is_remote_code "
        "mark_tied_weights_as_initialized named_non_persistent_buffers post_init retrieve_modules_from_names "
        "all_tied_weights_keys kernel_config loss_type smart_apply "
        "warn_if_padding_and_no_attention_mask config_class "
        "generation_config_class base_model_prefix adjust_generation_fn load_custom_generate",
        _INTERNAL,
    ),
    ("from_pretrained from_config", "use AutoModelForCausalLM.from_pretrained"),
    ("get_encoder", "Gemma has no encoder; get_decoder() gives the network without its head"),
    ("get_position_embeddings", "Gemma has rotary positions, which are computed and not stored"),
    ("heal_tokens", "end the prompt at the end of a word"),
    ("prepare_inputs_for_generation", "generate keeps keys and values itself; call it with input_ids"),
    ("input_modalities output_modalities", _KINDS),
    (
        "greedy_search sample contrastive_search beam_search group_beam_search assisted_decoding",
        "use generate, with do_sample and the options of GenerationConfig",
    ),
)

_SLOW = "there is one tokenizer, a fast one; tokenizer.tokenizer.backend is the tokenizers library's object"
_VOCABULARY = "the vocabulary is the checkpoint's own and does not grow; change it with transformers and load it again"
_PAIRS = "Gemma has no pairs of texts; join them yourself"
_RESPONSE = "the answer is text; decode it and read it yourself"

TOKENIZER = _table(
    (
        "can_save_slow_tokenizer slow_tokenizer_class vocab_files_names pretrained_vocab_files_map "
        "convert_to_native_format SPECIAL_TOKENS_ATTRIBUTES init_kwargs init_inputs deprecation_warnings model "
        "update_post_processor set_truncation_and_padding convert_added_tokens decoder add_prefix_space backend "
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output files_loaded verbose",
        _SLOW,
    ),
    (
        "split_special_tokens chat_control_tokens",
        "in apply_chat_template special tokens typed by a user stay plain text; for other texts use "
        "tokenizer.tokenizer.encode(..., parse_special=False)",
    ),
    ("train_new_from_iterator sanitize_special_tokens", _VOCABULARY),
    ("max_len_sentences_pair truncate_sequences create_token_type_ids_from_sequences", _PAIRS),
    ("get_response_parser parse_response response_schema response_template", _RESPONSE),
    (
        "encode_message_with_chat_template",
        "encode the whole dialogue with apply_chat_template; its beginning is found in the cache",
    ),
    (
        "clean_up_tokenization",
        "Gemma's spaces are exact and nothing is cleaned up; replace what you want to in the decoded text",
    ),
    ("save_chat_templates save_vocabulary", "save_pretrained writes the whole tokenizer"),
    ("push_to_hub register_for_auto_class", _UPLOAD),
    ("from_pretrained", "use AutoTokenizer.from_pretrained"),
    ("prepare_for_model build_inputs_with_special_tokens prepare_seq2seq_batch", "call the tokenizer with the text"),
    ("as_target_tokenizer", "tokenize the target by a call of its own"),
    (
        "sep_token sep_token_id cls_token cls_token_id mask_token mask_token_id",
        "Gemma's tokenizer has no such token; bos_token, eos_token, pad_token and unk_token are there",
    ),
    ("additional_special_tokens additional_special_tokens_ids", "all_special_tokens and all_special_ids list them all"),
)

_CHANGED_CONFIG = "the config is read-only; write another config.json and load that"
_CLASSIFIER = "gemcut's models write text; they have no labels to choose from"
_OUTPUTS = "say it in the call: model(..., output_hidden_states=True)"
_NOT_MODEL = "read the file's own JSON, or load the model"
_PLANS = "a model is on one device in this version"

CONFIG = _table(
    (
        "from_dict from_json_file from_pretrained get_config_dict get_mtp_config update update_from_string "
        "convert_rope_params_to_dict standardize_rope_params register_for_auto_class "
        "allow_global_per_layer_attribute_access attribute_map",
        _CHANGED_CONFIG,
    ),
    ("save_pretrained push_to_hub to_json_file", "model.save_pretrained writes config.json beside the weights"),
    ("id2label label2id num_labels problem_type", _CLASSIFIER),
    ("output_attentions output_hidden_states return_dict use_return_dict", _OUTPUTS),
    (
        "base_model_ep_plan base_model_fsdp_plan base_model_pp_plan base_model_tp_plan base_config_key sub_configs "
        "sub_configs_defaults",
        _PLANS,
    ),
    (
        "chunk_size_feed_forward default_config_fields default_rope_type default_theta dict_dtype_to_str "
        "extra_config_files extra_files ignore_keys_at_rope_validation initializer_range is_custom_code "
        "is_heterogeneous is_remote_code keys_to_ignore_at_inference nested_rope_parameter_keys per_layer_attributes "
        "per_layer_config serialize_explicit_per_layer_config transformers_version use_bidirectional_attention",
        _INTERNAL,
    ),
    (
        "validate validate_architecture validate_layer_type validate_output_attentions validate_rope "
        "validate_token_ids",
        "the config was checked when it was read",
    ),
    ("rope_parameters", "rope_theta is the base of the rotary positions, with rope_local_base_freq in Gemma 3"),
    ("rope_scaling", "the positions of this model are not scaled; rope_theta is their base"),
)

_OFFSETS = "use tokenizer.tokenizer.backend.encode(text), whose result knows words and characters"
_READ_ONLY = "an output is not changed; take its fields, or dict(output.items()) for a dictionary"

ENCODING = _table(
    (
        "char_to_token char_to_word token_to_chars token_to_sequence token_to_word word_ids word_to_chars "
        "word_to_tokens sequence_ids encodings tokens",
        _OFFSETS,
    ),
    ("token_type_ids", "Gemma has no token types"),
    ("special_tokens_mask", "compare the ids with tokenizer.all_special_ids"),
    ("offset_mapping overflow_to_sample_mapping num_truncated_tokens overflowing_tokens length", _OFFSETS),
)

OUTPUT = _table(
    ("clear copy fromkeys move_to_end pop popitem setdefault update", _READ_ONLY),
    (
        "past_key_values",
        "the forward call keeps no keys and values: give it the whole text each time, or call generate",
    ),
    ("beam_indices sequences_scores", "beam search is not in this version"),
)
