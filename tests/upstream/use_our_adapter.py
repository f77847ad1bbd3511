"""Plugin of pytest: TransformerLens's tests find this package's adapter in place of its own."""


def pytest_sessionstart() -> None:
    """Register the adapter, after jaxtyping's hook is installed and before a test is imported."""
    from transformer_lens.model_bridge.supported_architectures import bd3lm as native

    import transformer_lens_bd3lm as ours

    native.BD3LMArchitectureAdapter = ours.BD3LMArchitectureAdapter
