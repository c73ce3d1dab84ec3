"""Models of transformers with the fused loss: the same loss and gradients as their own."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))

from test_models import FAMILIES, build
from tiny_models import build_model

from perplexity import Monitor
from perplexity.errors import InputError
from perplexity.integrations.transformers import PerplexityCallback, use_fused_loss

VOCABULARY = 305


def batch(rows=2, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[-1, -3:] = -100
    return dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))


def step(model, **given):
    model.zero_grad()
    out = model(**(batch() | given))
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    largest = max(gradient.abs().max() for gradient in one.values())
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=tolerance * largest, rtol=tolerance, msg=name
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = build(family, VOCABULARY)
    own, gradients = step(model)
    handle = use_fused_loss(model)
    fused, others = step(model)
    assert fused.logits is None and own.logits is not None
    torch.testing.assert_close(fused.loss, own.loss, atol=1e-6, rtol=1e-6)
    close(gradients, others)
    # without labels as before
    assert model(input_ids=batch()["input_ids"]).logits.shape == (2, 12, VOCABULARY)
    handle.undo()
    again, _ = step(model)
    assert (
        torch.equal(again.loss, own.loss)
        and again.logits is not None
        and "forward" not in vars(model)
    )


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(dict(num_items_in_batch=torch.tensor(7)), id="items-tensor"),
        pytest.param(dict(num_items_in_batch=7), id="items-number"),
        pytest.param(
            dict(labels=torch.full((2, 12), -100), num_items_in_batch=3), id="all-ignored"
        ),
        pytest.param(dict(shift_labels=torch.arange(24).view(2, 12)), id="shifted"),
        pytest.param(dict(output_hidden_states=True, use_cache=True), id="other-outputs"),
    ],
)
def test_what_a_trainer_gives(given):
    model = build_model(VOCABULARY)
    own, gradients = step(model, **given)
    with use_fused_loss(model):
        fused, others = step(model, **given)
    torch.testing.assert_close(fused.loss, own.loss, atol=1e-6, rtol=1e-6)
    close(gradients, others)
    if "output_hidden_states" in given:
        assert (
            len(fused.hidden_states) == len(own.hidden_states) and fused.past_key_values is not None
        )


def test_positional_arguments_and_tuples():
    model, given = build_model(VOCABULARY), batch()
    own = model(
        given["input_ids"], given["attention_mask"], labels=given["labels"], return_dict=False
    )
    with use_fused_loss(model):
        fused = model(
            given["input_ids"], given["attention_mask"], labels=given["labels"], return_dict=False
        )
    assert isinstance(fused, tuple)
    torch.testing.assert_close(fused[0], own[0])


def test_checkpointing_autocast_and_a_frozen_head():
    model = build_model(VOCABULARY).train()
    model.gradient_checkpointing_enable()
    own, gradients = step(model)
    with use_fused_loss(model):
        fused, others = step(model)
        close(gradients, others)
        model.lm_head.weight.requires_grad_(False)
        _, frozen = step(model)
        assert "lm_head.weight" not in frozen
        with torch.autocast("cpu", torch.bfloat16):
            half, others = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain, gradients = step(model)
    torch.testing.assert_close(half.loss, plain.loss, atol=2e-2, rtol=2e-2)
    close(gradients, others, 5e-2)
    assert torch.isclose(fused.loss, own.loss)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], "saved"])
def test_peft(targets):
    """Adapters in the body, low-rank ones on the head, and a head that is trained whole."""
    import peft

    torch.manual_seed(0)
    options = (
        dict(modules_to_save=["lm_head"], target_modules=["q_proj"])
        if targets == "saved"
        else dict(target_modules=targets)
    )
    model = peft.get_peft_model(build_model(VOCABULARY), peft.LoraConfig(r=2, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    own, gradients = step(model)
    with use_fused_loss(model):
        fused, others = step(model)
        torch.testing.assert_close(fused.loss, own.loss, atol=1e-6, rtol=1e-6)
        close(gradients, others)
        with model.disable_adapter():
            bare = model(**batch()).loss
    with model.disable_adapter():
        torch.testing.assert_close(bare, model(**batch()).loss, atol=1e-6, rtol=1e-6)
    assert not torch.isclose(bare, own.loss)


def test_a_copy_has_its_own():
    model = build_model(VOCABULARY)
    with use_fused_loss(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.mul_(2.0)
        assert not torch.isclose(other(**batch()).loss, model(**batch()).loss)
        assert set(model.state_dict()) == set(build_model(VOCABULARY).state_dict())
        assert model.generate(
            batch()["input_ids"][:1], max_new_tokens=2, do_sample=False
        ).shape == (1, 14)


def test_a_forward_that_was_wrapped_since_falls_through():
    """accelerate wraps a forward for mixed precision; ``undo`` works below the wrapper."""
    model = build_model(VOCABULARY)
    handle = use_fused_loss(model)
    inner = model.forward
    model.forward = lambda *args, **given: inner(*args, **given)
    assert model(**batch()).logits is None
    handle.undo()
    assert model(**batch()).logits is not None


def test_what_is_not_supported_is_refused_by_name():
    model = build("mixtral", VOCABULARY)
    with use_fused_loss(model), pytest.raises(InputError, match="output_router_logits"):
        model(**batch(), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(InputError, match="output_router_logits"):
        use_fused_loss(model)
    model = build_model(VOCABULARY)
    with use_fused_loss(model):
        with pytest.raises(InputError, match="logits_to_keep"):
            model(**batch(), logits_to_keep=2)
        with pytest.raises(InputError, match="in use"):
            use_fused_loss(model)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(InputError, match="loss of causal models"):
        use_fused_loss(model)
    with pytest.raises(InputError, match="model: expected"):
        use_fused_loss(torch.nn.Linear(2, 2))
    model = build_model(VOCABULARY)
    # a rule nobody declared
    model.lm_head.register_forward_hook(lambda module, given, out: out + 1.5 * out.sin())
    with pytest.raises(InputError, match="own logits differ"):
        use_fused_loss(model)


@pytest.mark.parametrize("family", ["Bart", "Marian", "Whisper", "Blenderbot"])
def test_a_loss_that_does_not_shift(family, tmp_path):
    """Decoders of encoder-decoder models take labels as they are, and no number of items."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        d_model=16,
        decoder_layers=1,
        encoder_layers=1,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        decoder_ffn_dim=16,
        encoder_ffn_dim=16,
        init_std=0.3,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    mask = {} if family != "Whisper" else dict(attention_mask=None)
    cases = [
        mask,
        mask | dict(num_items_in_batch=7),
        mask | dict(shift_labels=batch()["labels"].roll(1)),
    ]
    own = [step(model, **given) for given in cases]
    run = trainer(model, tmp_path, max_steps=1, learning_rate=0.0)
    callback = PerplexityCallback().attach(run)
    run.train()
    before = run.evaluate()
    with use_fused_loss(model):
        for given, (expected, gradients) in zip(cases, own, strict=True):
            fused, others = step(model, **given)
            assert fused.logits is None
            torch.testing.assert_close(fused.loss, expected.loss, atol=1e-6, rtol=1e-6)
            close(gradients, others)
        after = run.evaluate()
    exact = token_loss(model, run.eval_dataset.rows, shift=0)
    assert before["eval_token_loss"] == pytest.approx(exact, rel=1e-5)
    assert after["eval_token_loss"] == pytest.approx(exact, rel=1e-5)
    assert callback.monitor is not None


def test_a_loss_of_its_own_is_refused():
    model = build_model(VOCABULARY)
    own = type(model)

    class Scaled(own):
        def forward(self, *args, **given):
            out = super().forward(*args, **given)
            out.loss = None if out.loss is None else 2 * out.loss + 1
            return out

    model.__class__ = Scaled
    with pytest.raises(InputError, match="expected the mean loss of next tokens"):
        use_fused_loss(model)


def bamba(coefficient, dtype):
    import transformers

    torch.manual_seed(0)
    config = transformers.BambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[0],
        mamba_n_heads=8,
        mamba_d_head=8,
        initializer_range=0.3,
        z_loss_coefficient=coefficient,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=None,
    )
    return transformers.BambaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_z_loss_is_refused_by_name(dtype):
    """A z-loss of 1e-4, as Bamba trains with, was below the check's tolerance and was dropped."""
    for coefficient in (1e-4, 1e-9):
        with pytest.raises(InputError, match=f"z_loss_coefficient: expected 0, got {coefficient}"):
            use_fused_loss(bamba(coefficient, dtype))
    with use_fused_loss(bamba(0.0, dtype)):
        pass


ADDED = """
def forward(self, *args, **given):
    out = base.forward(self, *args, **given)
    if out.loss is not None:
        z = out.logits.float()
        out.loss = out.loss + {term}
    return out
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("term", "message"),
    [
        pytest.param("1e-5 * z.logsumexp(-1).pow(2).mean()", "expected the mean loss", id="z-loss"),
        pytest.param(
            "1e-1 * (z - z.detach()).pow(1)[..., 0].mean()",
            "expected the gradient",
            id="gradient alone",
        ),
    ],
)
def test_terms_without_source_code_are_found_by_comparison(dtype, term, message):
    """The loss is compared with that of the same logits in float32: 16 bits would hide a term."""
    model = build_model(VOCABULARY).to(dtype)
    found = dict(base=type(model))
    exec(ADDED.format(term=term), found)  # code without a file
    model.__class__ = type("Altered", (type(model),), dict(forward=found["forward"]))
    with pytest.raises(InputError, match=message):
        use_fused_loss(model)
    assert "forward" not in vars(model)


def test_a_float32_head_on_a_16_bit_body():
    """Reinforcement learning keeps the head in float32; the body rounds the head's gradient."""
    model = build("llama", VOCABULARY).to(torch.bfloat16)
    head = model.lm_head.float()
    head.forward = lambda hidden: torch.nn.functional.linear(hidden.float(), head.weight)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    plain = model(input_ids=ids, labels=ids).loss
    (expected,) = torch.autograd.grad(plain, [head.weight])
    with use_fused_loss(model):
        fused = model(input_ids=ids, labels=ids).loss
        (got,) = torch.autograd.grad(fused, [head.weight])
    assert fused.item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_16_bits_is_accepted(family):
    with use_fused_loss(build(family, VOCABULARY).to(torch.bfloat16)) as handle:
        assert handle.active


@pytest.mark.parametrize("kind", ["LoHaConfig", "IA3Config", "LoraConfig"])
def test_another_adapter_on_the_head_is_refused(kind):
    import peft

    options = dict(
        IA3Config=dict(feedforward_modules=["lm_head"]),
        LoHaConfig=dict(r=2),
        LoraConfig=dict(r=2, lora_bias=True),
    )
    config = getattr(peft, kind)(target_modules=["lm_head"], **options[kind])
    with pytest.raises(InputError, match="expected plain LoRA on the head"):
        use_fused_loss(peft.get_peft_model(build_model(VOCABULARY), config))


@pytest.mark.parametrize("option", [dict(use_dora=True), dict(lora_dropout=0.5)], ids=str)
def test_adapters_of_the_head_that_are_refused(option):
    import peft

    model = peft.get_peft_model(
        build_model(VOCABULARY), peft.LoraConfig(r=2, target_modules=["lm_head"], **option)
    )
    with pytest.raises(InputError, match=next(iter(option))):
        use_fused_loss(model.train())


class Rows(torch.utils.data.Dataset):
    """Sequences of unequal numbers of labels, of a language with four successors a token."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        successors = torch.randint(
            VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(9)
        )
        self.rows = []
        for number in range(count):
            ids = [int(torch.randint(VOCABULARY, (), generator=generator))]
            while len(ids) < 16:
                ids.append(int(successors[ids[-1], int(torch.randint(4, (), generator=generator))]))
            labels = [*ids]
            hidden = 1 + 12 * (number // 2 % 2)  # few labels in every other batch
            labels[:hidden] = [-100] * hidden
            self.rows.append(dict(input_ids=torch.tensor(ids), labels=torch.tensor(labels)))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place]


def trainer(model, folder, *callbacks, kind=None, given=None, **options):
    import transformers

    usual = dict(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        report_to=[],
        use_cpu=True,
        seed=3,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    arguments = transformers.TrainingArguments(str(folder), **usual | options)
    data = dict(train_dataset=Rows(24, 0), eval_dataset=Rows(8, 1)) | (given or {})
    return (kind or transformers.Trainer)(
        model=model, args=arguments, callbacks=list(callbacks), **data
    )


def token_loss(model, rows, shift=1):
    """The exact mean of −log p over the labels of rows, from the model's logits in float64."""
    total = count = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0].double()
        target = row["labels"][shift:]
        kept = target != -100
        chosen = logits[: len(target)][kept]
        total += torch.nn.functional.cross_entropy(chosen, target[kept], reduction="sum").item()
        count += int(kept.sum())
    return total / count


def test_a_trainer_follows_the_same_curve(tmp_path):
    """Gradient accumulation with an average over all of a step's labels, which Trainer counts."""
    runs = []
    for fused in (False, True):
        model = build_model(VOCABULARY)
        if fused:
            use_fused_loss(model)
        run = trainer(model, tmp_path)
        run.train()
        runs.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert len(runs[0]) == 6 and runs[0] == pytest.approx(runs[1], rel=2e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_the_callback_counts_tokens(tmp_path, fused, attached):
    model = build_model(VOCABULARY)
    if fused:
        use_fused_loss(model)
    seen = []

    class Tracker(__import__("transformers").TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    callback = PerplexityCallback()
    run = trainer(model, tmp_path, Tracker(), *([] if attached else [callback]))
    if attached:
        callback.attach(run)
    run.train()
    metrics = run.evaluate()
    exact = token_loss(model, run.eval_dataset.rows)
    assert metrics["eval_token_loss"] == pytest.approx(exact, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(exact), rel=1e-5)
    assert abs(metrics["eval_loss"] - metrics["eval_token_loss"]) > 1e-3, (
        "batch means are not what is wanted here"
    )
    history = [row for row in run.state.log_history if "eval_perplexity" in row]
    assert [row["step"] for row in history] == [3, 6, 6]
    assert all(
        row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        for row in run.state.log_history
        if "loss" in row
    )
    assert any("eval_perplexity" in logs for logs in seen) == attached
    digest = callback.monitor.digest
    assert [evaluation.step for evaluation in digest.evaluations] == [3, 6, 6]


CUSTOM = dict(
    compute_loss_func=lambda outputs, labels, num_items_in_batch=None: (
        outputs.logits.square().mean()
    )
)
ROUTER = dict(output_router_logits=True, router_aux_loss_coef=0.5)


class AddsFive(__import__("transformers").Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **given):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **given)
        return (loss + 5.0, outputs) if return_outputs else loss + 5.0


@pytest.mark.parametrize(
    ("family", "config", "kind", "given", "options"),
    [
        pytest.param("mixtral", ROUTER, None, {}, {}, id="router's loss"),
        pytest.param("llama", {}, None, {}, dict(label_smoothing_factor=0.3), id="label smoothing"),
        pytest.param("llama", {}, None, CUSTOM, {}, id="loss function"),
        pytest.param("llama", {}, AddsFive, {}, {}, id="compute_loss"),
    ],
)
def test_perplexity_is_of_token_losses_alone(tmp_path, family, config, kind, given, options):
    """Once the perplexity was exp of the training loss, with router's term and smoothing."""
    model = build(family, VOCABULARY)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.router_aux_loss_coef = config.get("router_aux_loss_coef")
    callback = PerplexityCallback()
    run = trainer(
        model, tmp_path, kind=kind, given=given, max_steps=1, learning_rate=0.0, **options
    )
    callback.attach(run).attach(run)
    seen, collate = [], run.data_collator
    run.data_collator = lambda rows: seen.extend(rows) or collate(rows)
    run.train()
    metrics = run.evaluate()
    seen = seen[:4]
    exact = token_loss(model, run.eval_dataset.rows)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(exact), rel=1e-5)  # float32 logits
    assert abs(metrics["eval_loss"] - exact) > 0.05
    # The learning rate is 0, so the weights are those of the step: one of two batches of two.
    row = next(row for row in run.state.log_history if "loss" in row)
    assert row["perplexity"] == pytest.approx(math.exp(token_loss(model, seen)), rel=1e-5)
    assert (
        len(seen) == 4
        and callback.monitor.digest.evaluations[-1].loss == metrics["eval_token_loss"]
    )


def test_labels_that_the_callback_cannot_see(tmp_path):
    run = trainer(
        build_model(VOCABULARY), tmp_path, PerplexityCallback(), label_smoothing_factor=0.3
    )
    with pytest.warns(UserWarning, match="no eval_perplexity is logged: no labels reach .*attach"):
        assert "eval_perplexity" not in run.evaluate()


def test_a_model_that_takes_labels_as_they_are(tmp_path):
    """Bart's decoder does not shift: shifting would have scored the wrong tokens."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        decoder_layers=1,
        encoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    run = trainer(transformers.BartForCausalLM(config), tmp_path, PerplexityCallback())
    exact = token_loss(run.model, run.eval_dataset.rows, shift=0)
    assert run.evaluate()["eval_token_loss"] == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_dead_model_is_not_a_perfect_one(tmp_path, fused):
    """Trainer logs 0.0 for a loss that is NaN, and the perplexity was 1.0."""
    model = build_model(VOCABULARY)
    if fused:
        use_fused_loss(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    run = trainer(model, tmp_path, PerplexityCallback(), max_steps=1)
    run.train()
    row = next(row for row in run.state.log_history if "loss" in row)
    assert row["loss"] == 0.0 and math.isnan(row["perplexity"])


def test_the_monitor_stops_training(tmp_path):
    monitor = Monitor(stop_on="non-finite")
    model = build_model(VOCABULARY)
    run = trainer(model, tmp_path, PerplexityCallback(monitor))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    run.train()
    assert run.state.global_step < 6 and monitor.stopped_by.signal == "non-finite"


def test_the_callback_measures_this_evaluation_of_this_model(tmp_path):
    """Neither what another model said, nor a prediction, nor a forward of one's own."""
    callback = PerplexityCallback()
    first = trainer(build_model(VOCABULARY), tmp_path, callback)
    before = callback.attach(first).attach(first)
    assert first.callback_handler.callbacks.count(before) == 1
    first.evaluate()
    other = build_model(VOCABULARY)
    with torch.no_grad():
        other.lm_head.weight.mul_(3.0)
    run = trainer(other, tmp_path, callback)
    run.predict(Rows(6, 5))
    other.eval()
    other(**batch())
    found = run.evaluate()
    clean = trainer(other, tmp_path, PerplexityCallback()).evaluate()
    assert (
        found["eval_perplexity"]
        == clean["eval_perplexity"]
        != first.evaluate().get("eval_perplexity")
    )
    nothing = [dict(row, labels=torch.full((16,), -100)) for row in Rows(2, 5).rows]
    assert "eval_perplexity" not in run.evaluate(nothing)


def test_several_evaluation_sets(tmp_path):
    callback = PerplexityCallback()
    run = trainer(build_model(VOCABULARY), tmp_path, callback)
    run.eval_dataset = {"a": Rows(8, 1), "b": Rows(8, 2)}
    run.train()
    last = {name: value for row in run.state.log_history for name, value in row.items()}
    assert last["eval_a_perplexity"] != last["eval_b_perplexity"]
    assert [evaluation.step for evaluation in callback.monitor.digest.evaluations] == [3, 6]


def test_statistics_come_with_the_loss(tmp_path):
    model = build_model(VOCABULARY)
    given = batch()
    logits = model(input_ids=given["input_ids"]).logits
    with use_fused_loss(model, statistics=True):
        outputs = model(**given)
        statistics = outputs.token_statistics
        assert outputs["token_statistics"] is statistics and outputs.loss.requires_grad
        labels = given["labels"][:, 1:]
        counted = labels != -100
        assert statistics.predicted.shape == labels.shape
        assert torch.equal(statistics.predicted[counted], logits[:, :-1].argmax(-1)[counted])
        torch.testing.assert_close(statistics.nll[counted].mean(), outputs.loss)
        with torch.no_grad():
            outputs = model(**given)
        # Trainer's evaluation takes the outputs' items for predictions.
        assert "token_statistics" not in outputs and outputs.token_statistics is not None
        # Metrics of predictions: the evaluation's outputs hold the loss alone.
        run = trainer(model, tmp_path)
        run.compute_metrics = lambda predictions: {}
        assert math.isfinite(run.evaluate()["eval_loss"])
        run.train()
    with pytest.raises(TypeError, match="statistics: expected True or False"):
        use_fused_loss(model, statistics="yes")
