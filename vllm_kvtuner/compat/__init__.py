"""The only place that patches vLLM: a room per concern, a function per seam, applied in one order.

Each seam says what would happen without it, why, and when it can go. None changes a run whose ``--kv-cache-dtype`` is
not ``kvtuner``. ``versions`` names the vLLM versions that they fit, ``seams`` lists what they, and the rooms below,
rely on in vLLM that it may change at any time.
"""

_applied = False


def apply() -> None:
    """Install every seam in this process; may run any number of times."""
    # Here, so that whoever asks for versions alone imports no vLLM; it may not even be installed.
    from vllm_kvtuner.compat import blocks, connectors, layers, reporting, settings, transfers, weights, worker

    global _applied
    if _applied:
        return
    _applied = True
    layers.register_backend()
    settings.register_kv_cache_dtype()
    settings.add_profile_argument()
    settings.check_engine_config()
    layers.give_layers_their_backend()
    layers.check_layers_are_met()
    layers.bind_statics_after_loading()
    weights.renew_what_follows_weights()
    worker.warm_kernels_up()
    blocks.size_blocks_by_the_mean_page()
    blocks.group_layers_by_the_block()
    blocks.register_recent_windows()
    blocks.allocate_where_needed()
    worker.wake_kernels_up()
    connectors.tell_connectors_of_the_profile()
    transfers.refuse_other_pages()
    transfers.pack_pages_for_transfers()
    transfers.transfer_whole_pages()
    transfers.leave_last_token_to_reader()
    transfers.bring_sink_tokens()
    reporting.log_capacity_once()
    reporting.tell_front_end_of_kernels()
    reporting.publish_metrics()
