"""The ground that every stage stands on: errors, whole files and locks, memory, threads, names of formats."""
