"""Whether task, settings and model fit together: everything here is known before anything heavy starts."""

from seer_jax.config.schema import RunConfig
from seer_jax.core.errors import ConfigError
from seer_jax.core.types import MAX_STOP_TOKENS
from seer_jax.models.config import DecoderConfig
from seer_jax.train.tasks.task import Task


def check_task(task: Task, config: RunConfig, model_config: DecoderConfig) -> None:
    """Check that every prompt fits with its response, and that the model knows its tokens.

    Args:
        task: The task that `config.data` names.
        config: The configuration.
        model_config: Shape of the model.

    Raises:
        ConfigError: Names the setting, its value and the fix.
    """
    if config.engine.expert_ids:
        _ = model_config.expert_ids_shape  # Raises if there are none.
    limit, longest, max_tokens = config.engine.max_model_len, task.max_prompt_tokens, config.sampling.max_tokens
    needed = longest + max_tokens
    if needed > limit:
        problem = f"is {limit}, but the longest prompt {longest} + sampling.max_tokens {max_tokens} = {needed} tokens"
        fix = f"raise it to {needed}, or " + (
            f"lower sampling.max_tokens to {limit - longest}" if longest < limit else "leave out long prompts"
        )
        raise ConfigError("engine.max_model_len", problem, fix)
    task.check_tokenizer(model_config)


def stop_token_ids(config: RunConfig, model_config: DecoderConfig) -> tuple[int, ...]:
    """Choose the tokens that end a response: those configured, else the model's own.

    Args:
        config: The configuration.
        model_config: Shape of the model.

    Returns:
        At most `MAX_STOP_TOKENS` ids; none if neither names one, and every response runs to its limit.

    Raises:
        ConfigError: If they are too many, or one is outside the vocabulary.
    """
    chosen = config.sampling.stop_token_ids or model_config.eos_token_id
    if len(chosen) > MAX_STOP_TOKENS:
        problem = f"{list(chosen)} are {len(chosen)} tokens"
        fix = f"give at most {MAX_STOP_TOKENS}; if unset, the model's eos_token_id is taken"
        raise ConfigError("sampling.stop_token_ids", problem, fix)
    for token_id in chosen:
        if not 0 <= token_id < model_config.vocab_size:
            problem = f"{token_id} is outside the vocabulary of {model_config.vocab_size}"
            raise ConfigError("sampling.stop_token_ids", problem, f"give ids of 0 to {model_config.vocab_size - 1}")
    return chosen
