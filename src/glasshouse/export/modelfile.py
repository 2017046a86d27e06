"""An Ollama Modelfile: which file, in which words a prompt reaches the model, where an answer ends.

Ollama writes prompts with templates of Go's text/template, so a chat template in Jinja has to be said again: for ChatML,
which is ours, it is; for others Ollama looks for a template it knows in the GGUF file itself. Knows no files.
Source: github.com/ollama/ollama, docs/modelfile.md and docs/template.md.
"""

import math
from collections.abc import Mapping
from typing import Any

from glasshouse.errors import InputError
from glasshouse.text.chat import render
from glasshouse.text.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer

PLAIN = "{{ .Prompt }}"
CHATML = """\
{{- if or .System .Tools }}<|im_start|>system
{{ if .System }}{{ .System }}{{ if .Tools }}

{{ end }}{{ end }}{{ if .Tools }}# Tools

You may call one or more of these functions, given as JSON schemas:
<tools>
{{- range .Tools }}
{"type": "function", "function": {{ .Function }}}
{{- end }}
</tools>

Write each call as a JSON object with its name and arguments:
<tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call>{{ end }}<|im_end|>
{{ end }}
{{- range $index, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $index)) 1 }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "tool" }}<|im_start|>user
<tool_response>
{{ .Content }}
</tool_response><|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}
{{- range $number, $call := .ToolCalls }}
{{- if or $message.Content $number }}
{{ end }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>
{{- end }}
{{- if not $last }}<|im_end|>
{{ end }}
{{- end }}
{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}"""
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
"""Keys of generation_config.json by the names of Ollama's parameters."""
PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "one"}],
    [
        {"role": "system", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ],
)


def speaks_chatml(tokenizer: Tokenizer) -> bool:
    """Whether the chat template writes plain ChatML: found by rendering conversations, not by its wording."""
    if not tokenizer.chat_template or not {START_OF_TURN, END_OF_TURN} <= set(tokenizer.special):
        return False
    for messages in PROBES:
        turns = [f"{START_OF_TURN}{m['role']}\n{m['content']}{END_OF_TURN}\n" for m in messages]
        try:
            text = render(tokenizer.chat_template, messages, add_generation_prompt=True)
        except InputError:
            return False
        if text != "".join(turns) + f"{START_OF_TURN}assistant\n":
            return False
    return True


def modelfile(
    file: str, tokenizer: Tokenizer, generation: Mapping[str, Any], context: int, converses: bool
) -> str:
    """The text of a Modelfile.

    Args:
        file: the name of the GGUF file beside it.
        tokenizer: the model's; its special tokens end answers.
        generation: contents of generation_config.json.
        context: how many positions the model reads.
        converses: whether the model was trained on conversations; otherwise a prompt is continued as it is.
    """
    stops = [tokenizer.end_of_document]
    chatml = converses and speaks_chatml(tokenizer)
    if chatml:
        stops.append(tokenizer.special[END_OF_TURN])
    named = generation.get("eos_token_id")
    stops += [token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)]
    spelled = dict.fromkeys(tokenizer.decode([token], keep_special=True) for token in stops)
    lines = [f"FROM ./{file}"]
    if chatml or not converses:
        lines.append(f'TEMPLATE """{CHATML if chatml else PLAIN}"""')
    lines += [f'PARAMETER stop "{text}"' for text in spelled if '"' not in text]
    lines += [f"PARAMETER num_ctx {context}"]
    for theirs, ours in PARAMETERS.items():
        value = generation.get(theirs)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            lines.append(f"PARAMETER {ours} {value:g}")
    return "\n".join(lines) + "\n"
