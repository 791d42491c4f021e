"""Pretrained chat models: chat formats in the manner of model families (none is a copy) and their tokenizers, each in a
locally saved random model."""

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers

from algos import archer, st_ppo
from conftest import CHATML, ROOT, Script, byte_tokenizer, random_model, streams
from envs.episodes import Turn
import policies
from policies import Policy, load_policy
from rollouts import rollout
from utils import RunArgs, collate, token_logprobs

LAKE = "turnrl/FrozenLake-v0"


@dataclasses.dataclass
class Format:
    template: str
    specials: list[str]
    end: str  # ends an answer
    after: str  # then, before the text of the next message
    system: bool = True  # has a role for it
    padding: str | None = None  # None: the end


FORMATS = {
    "chatml": Format(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", "\n<|im_start|>user\n"),
    "llama3": Format(
        "{{ '<|begin|>' }}{% for m in messages %}"
        "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
        ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<|end_of_text|>"], "<|eot|>",
        "<|head|>user<|/head|>\n\n", padding="<|end_of_text|>"),
    "mistral": Format(  # answers begin with a space; the rules stand in the first message
        "{{ '<s>' }}{% if messages[0].role == 'system' %}{% set rules = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set rules = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (rules if loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", "[INST] "),
    "gemma": Format(  # no system role, and the model is called so
        "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
        " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<bos>", "<start_of_turn>", "<end_of_turn>", "<pad>", "<eos>"], "<end_of_turn>",
        "\n<start_of_turn>user\n", system=False, padding="<pad>"),
}


def tokenizer_of(form: Format):
    tokenizer = byte_tokenizer(form.template, form.specials, form.end)
    tokenizer.pad_token = form.padding or form.end
    return tokenizer


@pytest.fixture(params=FORMATS)
def form(request) -> Format:
    return FORMATS[request.param]


@pytest.fixture
def folder(form, tmp_path) -> str:
    """A folder as it comes from a hub: bf16 weights, a tokenizer, its template."""
    tokenizer = tokenizer_of(form)
    random_model("llama", len(tokenizer)).to(torch.bfloat16).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def conversation(form: Format, instructions: str, pairs: list[tuple[str, str]], last: str) -> list[dict]:
    """The messages of a dialogue, the rules where this format wants them."""
    chat, rules = [], instructions
    if instructions and form.system:
        chat, rules = [{"role": "system", "content": instructions}], ""
    for observation, answer in [*pairs, (last, None)]:
        chat.append({"role": "user", "content": f"{rules}\n\n{observation}" if rules else observation})
        chat += [{"role": "assistant", "content": answer}] if answer is not None else []
        rules = ""
    return chat


def history(policy, form, words, started, instructions=""):
    """A played row and, as the tokenizer reads it, what the template makes of the same dialogue."""
    envs, [episode] = started(LAKE, [5])
    pairs, row = [], []
    for word in words:
        ids, starts_row = policy.prompt(episode)
        turn = Turn(episode.observation, word, ids, starts_row, [*policy.spell(word)[0], policy.end_id])
        chat = conversation(form, instructions, pairs, episode.observation)
        rendered = policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        row = ([] if starts_row else episode.row()) + ids
        pairs.append((episode.observation, word))
        episode.answer(envs[0], turn)
    return row, policy.tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("instructions", ["", "Play well."])
def test_the_history_is_token_for_token_what_the_template_renders(form, instructions, started):
    """Three turns: append-only rows equal one rendering of the whole dialogue."""
    tokenizer = tokenizer_of(form)
    policy = Policy(random_model("llama", len(tokenizer)), tokenizer, "cpu", instructions)
    row, rendered = history(policy, form, ("left", "jump", "up"), started, instructions)
    assert row == rendered


def test_a_sampled_end_is_trained_a_forced_one_is_not_and_the_rest_of_the_markup_never(form, started, monkeypatch):
    """Turn 0 ends itself after one token, turn 1 is cut after two: both stand in the row with an end."""
    tokenizer = tokenizer_of(form)
    policy = Policy(random_model("llama", len(tokenizer)), tokenizer, "cpu", "Play well.")
    a = policy.encode("a")[0]
    monkeypatch.setattr("rollouts.sample_tokens", Script(policy, [[a, policy.end_id, a, a, a, a]]))
    envs, [episode] = started(LAKE, [1])
    policy.max_turn_tokens = 2
    rollout(policy, envs, [episode], streams(1), max_turns=3, temperature=1.0)
    batch = collate([episode], policy.device)
    tokens, turn_id = batch["tokens"][0], batch["turn_id"][0]
    assert tokens[turn_id >= 0].tolist() == [a, policy.end_id, a, a, a, a]
    ends = (tokens == policy.end_id) & (turn_id < 0)
    after_cut = (turn_id == 1).nonzero()[-1, 0] + 1
    assert ends[after_cut] and tokens[after_cut] == policy.end_id
    opened = tokenizer.decode(tokens[after_cut + 1:])
    assert opened.startswith(form.after + episode.turns[2].observation)


def test_a_bf16_folder_is_loaded_in_fp32_with_the_rules_as_its_opening(form, folder):
    policy = load_policy(RunArgs(model=folder))
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())
    assert policy.bf16 == policies.fast_bf16("cpu")
    head = policy.tokenizer.decode(policy.head.ids)  # "hole" is a word of Frozen Lake's instructions
    assert "hole" in head + policy.head.text and ("system" in head) == (form.system and form is not FORMATS["mistral"])


SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))


def short(module, folder, run_dir, **flags):
    """The summary of a run of one iteration, and the policy in its checkpoint."""
    flags |= {"critic_steps": 1, "critic_batch_turns": 4, "actor_batch_turns": 4, "actor_warm_up": 0, "max_turns": 3,
              "max_turn_tokens": 3, "num_iterations": 1, "context_limit": 2000, "print_samples": 0}
    summary = module.main(module.Args(model=folder, run_dir=str(run_dir), **{
        name: value for name, value in flags.items() if hasattr(module.Args, name)}))
    [run] = run_dir.iterdir()
    return summary, load_policy(RunArgs(model=str(run / "checkpoint")))


@pytest.mark.parametrize("form,script", [
    (list(FORMATS)[number % 4], script) for number, script in enumerate(SCRIPTS)], indirect=["form"])
def test_scripts_train_models_from_folders(form, folder, script, tmp_path):
    """Every script with one format, every format with two scripts."""
    module = importlib.import_module(f"algos.{script}")
    summary, saved = short(module, folder, tmp_path / "runs", num_prompts=2, eval_episodes=2,
                           group_size=1 if script == "archer" else 2)
    assert summary["iterations"] == 1 and summary["generated_tokens"] > 0
    assert saved.tokenizer.chat_template == form.template
    assert saved.model.state_dict().keys() == load_policy(RunArgs(model=folder)).model.state_dict().keys()


@pytest.mark.parametrize("form", ["chatml"], indirect=True)
def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient(form, folder, started):
    """Nor the rollout before it, whose cache must not be lost."""
    gradients, episodes = [], []
    for flag in (False, True):
        policy, passes = load_policy(RunArgs(model=folder, gradient_checkpointing=flag, max_turn_tokens=3)), []
        policy.bf16 = False  # which rounds a rollout in another way than a pass
        policy.worth_sharing = 10**9  # which would take a pass of its own
        envs, episodes = started(LAKE, [1, 2, 3])
        rollout(policy, envs, episodes, streams(3), max_turns=3, temperature=1.0)
        batch = collate(episodes, policy.device)
        policy.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))  # noqa: B023
        logprobs, _ = token_logprobs(policy, batch, 1.0)
        assert (logprobs - batch["old_logprobs"]).abs().max() < 1e-4
        logprobs.sum().backward()
        assert len(passes) == 1 + flag
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().sum() > 0


def opt(folder, width):
    """A random OPT, which computes with 32 numbers a token and takes in and gives out `width`."""
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    model = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=width, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, dropout=0.5, max_position_embeddings=2048))
    Policy(model, tokenizer, "cpu").save(folder)


def test_a_model_of_another_family(tmp_path, capsys):
    """OPT: dropout in its layers, which checkpointing sets to training, and layers in another place."""
    opt(tmp_path / "opt", 32)
    policy = load_policy(RunArgs(model=str(tmp_path / "opt"), gradient_checkpointing=True))
    tokens = torch.arange(60, 80)[None]
    assert torch.equal(policy.forward(tokens), policy.forward(tokens))
    with pytest.raises(SystemExit):
        archer.main(archer.Args(model=str(tmp_path / "opt"), run_dir=str(tmp_path)))
    assert "its layers are not where ArCHer" in capsys.readouterr().err


def test_the_critic_of_st_ppo_takes_hidden_states_of_any_width(tmp_path):
    """16 of them, from an OPT of hidden_size 32: values as for any other model, and an update."""
    opt(tmp_path / "opt", 16)
    critic = st_ppo.Critic(load_policy(RunArgs(model=str(tmp_path / "opt"))))
    torch.nn.init.ones_(critic.head.weight)
    turn_id = torch.tensor([[-1, -1, 0, 0, -1, 1], [-1, 0, 0, -1, -1, -1]])
    values = critic({"tokens": torch.arange(60, 72).view(2, 6), "turn_id": turn_id})
    assert critic.head.weight.shape == (1, 16) and ((values != 0) == (turn_id >= 0)).all()
    short(st_ppo, str(tmp_path / "opt"), tmp_path / "runs", env_id="words:tests/Words-v0", num_prompts=4, eval_episodes=1)
    [saved] = (tmp_path / "runs").glob("*/checkpoint/trainer_state.pt")
    assert torch.load(saved, weights_only=True)["critic"]["head.weight"].all(), "it starts at 0"


SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16}


@pytest.mark.parametrize("script", ["st_ppo", "archer"])
def test_critics_do_not_ask_the_configuration_for_their_width(script):
    """Gemma 3 with a part for images has the sizes of its language model in config.text_config. Its layers are not where
    ArCHer looks, so that gets a language model with such a configuration."""
    if script == "st_ppo":
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}
        model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
            text_config=SIZES, vision_config=vision, mm_tokens_per_image=4)).eval()
    else:
        model = random_model("qwen3", 300)
        model.config = SimpleNamespace(text_config=model.config)
    assert not hasattr(model.config, "hidden_size")
    policy = Policy.__new__(Policy)  # without a tokenizer
    policy.model, policy.device, policy.bf16 = model, torch.device("cpu"), False
    batch = {"tokens": torch.arange(6)[None], "turn_id": torch.tensor([[-1, -1, 0, 0, -1, 1]]), "starts": torch.tensor([2])}
    if script == "st_ppo":
        assert st_ppo.Critic(policy)(batch).shape == (1, 6)
    else:
        assert [x.shape for x in archer.TurnCritic(policy, 3)(batch)] == [(1, 3), (1, 3)]


@pytest.mark.parametrize("script", ["st_ppo", "archer"])
@pytest.mark.parametrize("form", ["chatml"], indirect=True)
def test_critics_of_a_checkpointed_policy_are_checkpointed(form, folder, script, tmp_path, monkeypatch):
    """ST-PPO walks its graph back twice; both runs end with the same parameters, if both read all rows whole."""
    monkeypatch.setattr(Policy, "worth_sharing", 10**9)
    module = importlib.import_module(f"algos.{script}")
    ends = [short(module, folder, tmp_path / str(flag), num_prompts=4, eval_episodes=1, gradient_checkpointing=flag)
            [1].model.state_dict() for flag in (False, True)]
    assert all(torch.allclose(weight, ends[1][name], atol=1e-5) for name, weight in ends[0].items())
    policy = load_policy(RunArgs(model=folder, gradient_checkpointing=True))
    critic = module.Critic(policy) if script == "st_ppo" else module.TurnCritic(policy, 2)
    passes = []
    critic.trunk.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    batch = {"tokens": torch.zeros(1, 6, dtype=torch.long), "turn_id": torch.tensor([[-1, -1, -1, 0, 0, 0]]),
             "starts": torch.tensor([3])}
    torch.stack([x.sum() for x in critic(batch)]).sum().backward()
    assert len(passes) == 2
