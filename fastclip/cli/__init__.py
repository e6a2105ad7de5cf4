"""The `fastclip` command: `main` knows the verbs, every verb is one file and a thin call into the other rooms."""
