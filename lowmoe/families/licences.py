"""Under which licence a repository's weights are, as its page names it.

Knows:        names of licences, not their terms: read those before a model is put to use.
Ignorant of:  what is in a repository.
"""

from collections.abc import Mapping

_BY_LICENCE: Mapping[str, tuple[str, ...]] = {
    "apache-2.0": (
        "MiniMaxAI/MiniMax-M1-80k",
        "Qwen/Qwen3-235B-A22B",
        "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3-Coder-480B-A35B-Instruct",
        "Qwen/Qwen3-Coder-Next",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "Qwen/Qwen3.5-122B-A10B",
        "Qwen/Qwen3.5-35B-A3B",
        "Qwen/Qwen3.5-397B-A17B",
        "Qwen/Qwen3.6-35B-A3B",
        "allenai/OLMoE-1B-7B-0924-Instruct",
        "baidu/ERNIE-4.5-21B-A3B-PT",
        "baidu/ERNIE-4.5-300B-A47B-PT",
        "hpcai-tech/grok-1",
        "ibm-granite/granite-3.1-3b-a800m-instruct",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        "mistralai/Mixtral-8x22B-v0.1",
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "mistralai/Mixtral-8x7B-v0.1",
        "openai/gpt-oss-120b",
        "openai/gpt-oss-20b",
    ),
    "databricks-open-model-license": ("databricks/dbrx-instruct",),
    "deepseek": ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-V2.5"),
    "llama2": ("meta-llama/Llama-2-70b-chat-hf",),
    "llama3.1": ("meta-llama/Llama-3.1-405B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    "llama4": (
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    ),
    "minimax-model-license": ("MiniMaxAI/MiniMax-Text-01", "MiniMaxAI/MiniMax-Text-01-hf"),
    "mit": (
        "MiniMaxAI/MiniMax-M2",
        "deepseek-ai/DeepSeek-R1",
        "deepseek-ai/DeepSeek-V3-0324",
        "deepseek-ai/DeepSeek-V3.2",
        "microsoft/Phi-3.5-MoE-instruct",
        "openai-community/gpt2",
        "openai-community/gpt2-large",
        "openai-community/gpt2-medium",
        "openai-community/gpt2-xl",
        "rednote-hilab/dots.llm1.inst",
        "zai-org/GLM-4.5",
        "zai-org/GLM-4.5-Air",
        "zai-org/GLM-4.6",
        "zai-org/GLM-4.7",
        "zai-org/GLM-4.7-Flash",
    ),
    "modified-mit": ("moonshotai/Kimi-K2-Instruct-0905",),
    "skywork-license": ("Skywork/Skywork-MoE-Base", "Skywork/Skywork-MoE-Base-FP8"),
    "tencent-hunyuan-a13b": ("tencent/Hunyuan-A13B-Instruct",),
    "tongyi-qianwen": (
        "Qwen/Qwen-72B-Chat",
        "Qwen/Qwen1.5-72B-Chat",
        "Qwen/Qwen1.5-MoE-A2.7B-Chat",
        "Qwen/Qwen2-72B-Instruct",
    ),
}

LICENCES: Mapping[str, str] = {
    repository: licence
    for licence, repositories in _BY_LICENCE.items()
    for repository in repositories
}
