"""Templates: MPT's prompt to the character, ChatML, format strings, which fields are read, and what is refused."""

import hashlib

import pytest

from trainer.data.config import FieldsConfig
from trainer.data.templates import INSTRUCT, Template


def rendered(template, row, fields=None, system=None):
    """(text, trained) of each segment."""
    segments = Template(template, fields or FieldsConfig(), system).segments(row)
    return [(segment.text, segment.trained) for segment in segments]


def test_the_instruct_prompt_is_the_published_one():
    digest = hashlib.sha256(INSTRUCT.encode()).hexdigest()
    assert digest == "7768da83ee0feb389c3bbcac0841599b1f953ff9ee5c448ec02fc560d762893f"
    assert (len(INSTRUCT), INSTRUCT.count("\n")) == (153, 6)


PROMPT = INSTRUCT.replace("{instruction}", "Add {1}")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add {1}", "context": "", "response": "2"}, PROMPT),
        ({"instruction": "Add {1}", "context": "to 1", "response": "2"}, PROMPT.replace("{1}", "{1}\nto 1")),
        ({"instruction": "Add {1}", "input": "to 1", "output": "2"}, PROMPT.replace("{1}", "{1}\nto 1")),
        ({"instruction": "Add {1}", "input": None, "output": "2", "context": None}, PROMPT),
        ({"prompt": "1 + 1 =", "response": "2"}, "1 + 1 ="),  # as it is: such sets hold finished prompts
        ({"prompt": "1 + 1 =", "completion": "2"}, "1 + 1 ="),
    ],
)
def test_the_example_decides_the_template(row, prompt):
    assert rendered(None, row) == [(prompt, False), ("2", True)]


def test_a_named_template_goes_before():
    row = {"prompt": "1 + 1", "response": "2"}
    assert rendered("instruct", row)[0][0] == INSTRUCT.replace("{instruction}", "1 + 1")
    assert rendered("plain", {"instruction": "a", "input": "b", "output": "c"}) == [("a\nb", False), ("c", True)]
    assert rendered("chatml", row) == [
        ("<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n", False),
        ("2<|im_end|>", True),
    ]


CHAT = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]


def chat(turns, role="role", content="content"):
    return {"messages": [{role: r, content: c} for r, c in turns]}


def test_every_assistant_turn_of_a_chat_is_trained():
    out = rendered(None, chat(CHAT))
    assert out == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
        ("See you<|im_end|>", True),
    ]
    # ChatML's own text, message by message, but for the newline after the last end.
    whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in CHAT)
    assert "".join(text for text, _ in out) + "\n" == whole


def test_system_messages():
    system = "<|im_start|>system\nBe brief<|im_end|>\n"
    given = chat([("system", "Be brief"), *CHAT[:2]])
    assert rendered(None, given)[0][0].startswith(system)
    assert rendered(None, chat(CHAT[:2]), system="Be brief") == rendered(None, given)
    assert rendered(None, given, system="Be long") == rendered(None, given)
    assert rendered("chatml", {"prompt": "a", "response": "b"}, system="Be brief")[0][0].startswith(system)


def test_fields_and_roles_of_other_data_sets():
    fields = FieldsConfig(messages="conversations", role="from", content="value", roles={"me": "user"})
    row = {"conversations": chat([("me", "Hi"), ("gpt", "Hello")], "from", "value")["messages"]}
    assert rendered(None, row, fields) == rendered(None, chat(CHAT[:2]))
    fields = FieldsConfig(instruction="question", response="answer", context="passage")
    row = {"question": "a", "passage": "b", "answer": "c", "response": "not this"}
    assert rendered("plain", row, fields) == [("a\nb", False), ("c", True)]


def test_a_format_string_takes_any_field():
    template = "{{Q}} {question} ({context})\nA: "
    row = {"question": "why {x}?", "input": "because", "output": "so"}
    assert rendered(template, row) == [("{Q} why {x}? (because)\nA: ", False), ("so", True)]
    assert rendered("{prompt}>", {"q": "a", "output": "b"}, FieldsConfig(prompt="q"))[0] == ("a>", False)


@pytest.mark.parametrize(
    ("template", "row", "form"),
    [
        (None, {"instruction": "Add", "response": "2"}, "instruction"),
        ("chatml", {"prompt": "Add", "response": "2"}, "prompt"),
        (None, chat([("user", "Add"), ("assistant", "2")]), "messages"),
        ("Q: {instruction}{context}", {"instruction": "Add", "context": "", "response": "2"}, "fields"),
    ],
)
def test_a_prompt_alone_is_what_examples_begin_with(template, row, form):
    made = Template(template, FieldsConfig(), "Be brief" if template == "chatml" else None)
    assert made.form(row) == form
    assert made.prompt("Add", form) == made.segments(row)[:1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"no response \(response, completion, output\); it has prompt: name the field"),
        ({"prompt": "a", "response": None}, r"no response \(.*\); it has prompt, response \(null\): name the field"),
        ({"prompt": "a", "response": " \n"}, "'response', the response, is empty"),
        ({"prompt": "a", "response": 3}, "'response' is int, expected text"),
        ({"prompt": ["a"], "response": "b"}, "'prompt' is list, expected text"),
        ({"question": "a", "response": "b"}, "none of the fields 'messages', 'instruction', 'prompt'; it has question"),
        ({"messages": []}, "no list of messages"),
        ({"messages": "Hi"}, "no list of messages"),
        ({"messages": ["Hi"]}, "message 1 is str, expected role and content"),
        (chat([("user", "a"), ("tool", "b")]), "message 2: role 'tool' is unknown; known are system, user"),
        (chat([("assistant", "a")]), r"message 1 is of role assistant, expected user \(or system\)"),
        (
            chat([("user", "a"), ("user", "b")]),
            "message 2 is of role user, expected assistant: roles have to alternate",
        ),
        (chat([("user", "a"), ("system", "b")]), "message 2 is of role system, expected assistant"),
        (chat([*CHAT[:2], ("assistant", "b")]), "message 3 is of role assistant, expected user"),
        (chat(CHAT[:3]), "the last message is of role user, expected a response"),
        (chat([("user", "a"), ("assistant", "")]), "message 2: the assistant's response is empty"),
        ({"messages": [{"role": "user"}]}, "message 1: no field 'content'; it has role"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        rendered(None, row)


def test_a_template_with_a_missing_field_is_refused():
    with pytest.raises(ValueError, match="the template needs the field 'question'; it has prompt, response"):
        rendered("{question}", {"prompt": "a", "response": "b"})
    with pytest.raises(ValueError, match="the template plain cannot show; use chatml"):
        rendered("plain", chat(CHAT))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("instrct", "expected instruct, chatml, plain, or a text with fields in braces"),
        ("{prompt", "is no format string"),
        ("{prompt.__class__}", "has to be a field's name alone"),
        ("{prompt!r}", "has to be a field's name alone"),
        ("{0}", "has to be a field's name alone"),
        ("{}", "has to be a field's name alone"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(ValueError, match=message):
        Template(template, FieldsConfig())


@pytest.mark.parametrize("template", ["instruct", "plain", "{prompt}"])
def test_a_system_prompt_that_no_template_shows_is_refused(template):
    with pytest.raises(ValueError, match="system_prompt is for the template chatml"):
        Template(template, FieldsConfig(), "Be brief")


def test_a_role_has_to_mean_one_of_three():
    with pytest.raises(ValueError, match=r"fields.roles.tool='helper'; expected system, user or assistant"):
        Template(None, FieldsConfig(roles={"tool": "helper"}))
