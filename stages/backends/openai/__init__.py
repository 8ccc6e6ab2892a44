"""Gets captions from servers with OpenAI's chat completions: vLLM, SGLang, `transformers serve`.

For each image there are two requests with greedy decoding, `caption.openai.concurrency` requests at
a time over all servers. If a request fails for good, a plain picture of the run's largest size is
sent to the same server. If that succeeds, the fault is the record's, and only the record fails. If
not, the fault is the server's or the configuration's: the request goes to another server, and if
none is left, the run ends with ServerError.

loop: an event loop in a thread. client: requests to one server. servers: which server is asked.
models: what servers state of their model. preflight: the check before a run. messages: errors.
"""

from stages.backends.openai.captioner import OpenAICaptioner

__all__ = ["OpenAICaptioner"]
