"""``bd3lm exact``, ``likelihood`` and ``sweep``: likelihoods of texts."""

from bd3lm_cli.models import boot, shared_device
from bd3lm_cli.options import (
    BlockSize,
    BlockSizes,
    Device,
    Field,
    File,
    Files,
    Json,
    MaxStates,
    MethodOption,
    Model,
    Out,
    Plot,
    Replicates,
    Rows,
    Seed,
    Split,
    Stride,
    Text,
    Texts,
    likelihood_options,
)
from bd3lm_cli.output import show
from bd3lm_cli.typed import corpus, one_of, read_file


def exact(
    model: Model,
    text: Text = None,
    file: File = None,
    block_size: BlockSize = None,
    max_states: MaxStates = 256,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compute the exact NLL, NELBO and reveal order of one text, over every order.

    Try: bd3lm exact tiny --text "To be, or not to be" --block-size 4
    """
    one_of(text=text, file=file)
    read = read_file(file) if file is not None else text
    bridge = boot(model, device)
    import transformer_lens_bd3lm as bd3lm

    result = bd3lm.exact(bridge, read, block_size, max_states=max_states)
    show(result, json, result.to_dict(), plot)


def likelihood(
    model: Model,
    text: Texts = None,
    file: Files = None,
    block_size: BlockSize = None,
    method: MethodOption = None,
    replicates: Replicates = 8,
    split: Split = None,
    field: Field = "text",
    stride: Stride = None,
    max_states: MaxStates = 256,
    seed: Seed = 0,
    rows: Rows = 2048,
    out: Out = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compute NLL and NELBO of a corpus; under `accelerate launch` processes share the work.

    Try: bd3lm likelihood tiny --file play.txt --block-size 8
    """
    texts = corpus(text, file)
    options = likelihood_options(
        method, replicates=replicates, split=split, field=field, stride=stride,
        max_states=max_states, seed=seed, rows=rows, out=out,
    )  # fmt: skip
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    bridge = boot(model, shared_device(device))
    result = bd3lm.likelihood(bridge, texts, block_size, **options)
    if processes().is_main_process:
        show(result, json, result.to_dict())


def sweep(
    model: Model,
    text: Texts = None,
    file: Files = None,
    block_sizes: BlockSizes = None,
    method: MethodOption = None,
    replicates: Replicates = 8,
    split: Split = None,
    field: Field = "text",
    stride: Stride = None,
    max_states: MaxStates = 256,
    seed: Seed = 0,
    rows: Rows = 2048,
    out: Out = None,
    plot: Plot = None,
    json: Json = None,
    device: Device = None,
) -> None:
    """Compute the likelihood of a corpus over block sizes, by default the powers of 2.

    Try: bd3lm sweep tiny --file play.txt --block-sizes 1,4,full --plot sizes.png
    """
    texts = corpus(text, file)
    options = likelihood_options(
        method, replicates=replicates, split=split, field=field, stride=stride,
        max_states=max_states, seed=seed, rows=rows, out=out,
    )  # fmt: skip
    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes

    bridge = boot(model, shared_device(device))
    result = bd3lm.sweep_block_sizes(bridge, texts, block_sizes, **options)
    if processes().is_main_process:
        show(result, json, result.to_dict()["likelihoods"], plot)
