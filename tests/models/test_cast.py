"""Who plays: where each part starts, what is read for it, and which families are decoders."""

import pytest
from transformers import AutoConfig

from gearshift.engine.config.errors import ConfigError
from gearshift.engine.config.schema import (
    Config,
    CriticConfig,
    PPOConfig,
    ReferenceConfig,
    RewardConfig,
    TrainedConfig,
)
from gearshift.engine.models.cast import cast, is_decoder
from tests.tiny import models as tiny


def judge(name: str, path, **changes) -> RewardConfig:
    return RewardConfig(name=name, kind="model", path=str(path), **changes)


def run(folder, rewards, critic=None, reference=None, **ppo) -> Config:
    return Config(
        actor=TrainedConfig(path=str(folder), revision="r1"),
        critic=critic or CriticConfig(),
        reference=reference or ReferenceConfig(),
        rewards=[RewardConfig(function="a:b"), *rewards],
        ppo=PPOConfig(**ppo),
    )


def save_bert(folder, architecture: str = "RobertaForSequenceClassification"):
    """An encoder by its configuration and tokenizer, which are those of a reward model."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    family = AutoConfig.for_model("roberta", num_attention_heads=1, vocab_size=32, **sizes)
    family.architectures = [architecture]
    family.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_parts_in_their_order_by_what_the_algorithm_needs(tmp_path):
    config = run(tmp_path, [judge("rm", "x"), judge("other", "y")])
    parts = cast(config)
    assert [*parts] == ["actor", "critic", "reference", "rm", "other"]
    assert [part.key for part in parts.values()][3:] == ["rewards.1", "rewards.2"]
    assert [part.name for part in parts.values() if part.trained] == ["actor", "critic"]
    few = run(tmp_path, [], estimator="reinforce_pp", kl_coef=0.0)
    assert [*cast(few)] == ["actor"]


def test_the_critic_starts_from_the_first_decoder_that_reads_the_actor_s_tokens(tmp_path):
    actor = tiny.save_policy(tmp_path / "actor")
    encoder = save_bert(tmp_path / "encoder")
    other, own = tiny.save_reward(tmp_path / "other"), tiny.save_reward(tmp_path / "own")
    tiny.tokenizer(31).save_pretrained(other)
    rewards = [judge("a", encoder), judge("b", other)]
    critic = cast(run(actor, rewards))["critic"]
    assert (critic.source.path, critic.source.revision) == (str(actor), "r1")
    assert critic.fresh_head and critic.assumption is None
    critic = cast(run(actor, [*rewards, judge("c", own, revision="r2")]))["critic"]
    assert (critic.source.path, critic.source.revision) == (str(own), "r2")
    assert not critic.fresh_head and type(critic.source) is CriticConfig


def test_what_has_a_path_starts_there(tmp_path):
    actor, reward = tiny.save_policy(tmp_path / "actor"), tiny.save_reward(tmp_path / "reward")
    for path, fresh in ((actor, True), (reward, False)):
        config = run(actor, [judge("rm", reward)], CriticConfig(path=str(path), revision="r3"))
        critic = cast(config)["critic"]
        assert critic.named and critic.source is config.critic and critic.fresh_head is fresh
    assert cast(config)["reference"].source.path == str(actor)
    own = run(actor, [], reference=ReferenceConfig(path=str(reward)))
    assert cast(own)["reference"].source.path == str(reward)


def test_families_are_compared_where_a_tokenizer_is_not_there(tmp_path):
    actor, reward = tiny.save_policy(tmp_path / "actor"), tiny.save_reward(tmp_path / "reward")
    for file in reward.glob("tokenizer*"):
        file.unlink()
    critic = cast(run(actor, [judge("rm", reward)]))["critic"]
    assert critic.source.path == str(reward)
    assert "rm's is the actor's" in critic.assumption


def test_messages_name_the_section(tmp_path):
    parts = cast(run(tmp_path, [judge("rm", tmp_path / "nowhere")]))
    with pytest.raises(ConfigError, match=r"^rewards.1.path='.*nowhere': no such directory$"):
        _ = parts["rm"].hf_config
    with pytest.raises(ConfigError, match=r"^actor.path='.*': the directory has no config.json$"):
        _ = parts["actor"].hf_config


@pytest.mark.parametrize(
    ("family", "decoder"),
    [
        *((name, True) for name in ("llama", "qwen2", "gemma2", "gpt2", "mixtral", "opt")),
        *((name, False) for name in ("bert", "roberta", "deberta-v2", "modernbert", "t5", "bart")),
    ],
)
def test_which_families_are_decoders(family, decoder):
    assert is_decoder(AutoConfig.for_model(family)) is decoder


def test_a_model_s_own_code_says_what_it_is():
    config = AutoConfig.for_model("llama")
    config.auto_map = {"AutoModelForMaskedLM": "modeling.Own"}
    assert not is_decoder(config)
