"""How the user-agents of the harnesses begin that the tables know."""

CLAUDE = "claude-cli/"
CODEX = "codex_"
GEMINI = "GeminiCLI"
OPENCODE = "opencode/"
PI = "pi ("
QWEN = "QwenCode/"
