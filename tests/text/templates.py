"""Chat templates that take tools, laid out as the model cards of DeepSeek-V2.5 and Hermes 2 Pro say."""

DEEPSEEK_TOOLS = r"""
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] -}}{%- endif -%}
{%- if tools -%}
  {{- '\n\n## Tools\n\n### Function\n\nYou have the following functions available:' -}}
  {%- for tool in tools -%}
    {{- '\n\n- `' + tool['function']['name'] + '`:\n```json\n' + tool['function'] | tojson(indent=4) + '\n```' -}}
  {%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'tool' -%}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<｜Assistant｜>' -}}
    {%- if message['tool_calls'] and message['content'] is none -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for call in message['tool_calls'] -%}
        {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] + '\n```json\n' -}}
        {{- call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' -}}
        {%- if not loop.last -%}{{- '\n' -}}{%- endif -%}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' + eos_token -}}
    {%- else -%}
      {{- message['content'] + eos_token -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""
"""Wants arguments as text, and content None beside calls, as the official template of DeepSeek-V3 does."""

HERMES_TOOLS = r"""
{{- bos_token -}}
{%- if tools -%}
  {{- 'system\nYou may call functions:\n<tools>' -}}
  {%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
  {{- '\n</tools>\nas <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- message.role + '\n' + message.content -}}
  {%- for call in message.tool_calls or [] -%}
    {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
    {{- call.function.arguments | tojson + '}\n</tool_call>' -}}
  {%- endfor -%}
  {{- eos_token + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant\n' -}}{%- endif -%}
"""
"""Wants arguments as objects, and content "" beside calls, as Qwen's templates do."""
