"""The OpenAI-compatible server of llama-cpp-python over `hobbit_cpp.Llama`: `hobbit serve`.

app: upstream's application with our model in it, and what it lacks. metrics: the offload as Prometheus text.
"""
