"""The engine behind OpenAI's HTTP API: requests in, JSON or a stream of it out.

`loop` runs the engine in a thread; `protocol` reads request bodies; `completions` and `chat` turn bodies into prompts
and what the engine says into answers; `app` is the HTTP around them; `limits` and `server` guard connections and end
the process well. Only `app`, `limits`, `responses`, `server` and `command` know fastapi or uvicorn, none knows torch.
"""
